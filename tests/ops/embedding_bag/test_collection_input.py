"""What EmbeddingBagCollection and its configs take: bare tensors, integer tables, and clear errors for the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import recsys_kernels as rk

INDICES, OFFSETS = torch.tensor([5, 7, 0, 1]), torch.tensor([0, 2])


def collection(**options: Any) -> rk.EmbeddingBagCollection:
    return rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", 10, 6, **options)])


def test_a_bare_tensor_of_two_dimensions_is_one_bag_a_row() -> None:
    c = collection()
    expected = c.table("a")[INDICES.view(2, 2)].sum(1)
    torch.testing.assert_close(c({"a": INDICES.view(2, 2)}), expected)
    torch.testing.assert_close(c({"a": (INDICES, OFFSETS)}), expected)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (INDICES, ValueError, "feature 'a' is a 1-D tensor without offsets"),
        (INDICES[:2], ValueError, "feature 'a' is a 1-D tensor without offsets"),
        ((INDICES, OFFSETS, torch.ones(4)), TypeError, "feature 'a' has three parts; a mapping takes no per_sample"),
        ((INDICES,), TypeError, r"feature 'a' must be \(indices, offsets\), but is tuple"),
        (3, TypeError, "feature 'a' must be .*, but is int"),
        (([5, 7], OFFSETS), TypeError, "indices of feature 'a' must be a tensor, but is list"),
        ((INDICES, [0, 2]), TypeError, "offsets of feature 'a' must be a tensor, but is list"),
    ],
)
def test_other_input_is_an_error_that_names_the_feature(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        collection()({"a": value})


def test_configs_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match=r"weight_dtype of table 'a' must be .*, but is torch\.int8; bits=8"):
        rk.EmbeddingBagConfig("a", 10, 6, weight_dtype=torch.int8)
    with pytest.raises(ValueError, match="bits of table 'a' must be 8, 4 or None, but is 16"):
        rk.EmbeddingBagConfig("a", 10, 6, bits=16)
    with pytest.raises(ValueError, match=r"weight_dtype must be .*, but is torch\.int32"):
        rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", 10, 6)], weight_dtype=torch.int32)


@pytest.mark.parametrize("bits", [8, 4])
def test_integer_tables_are_built_and_loaded(bits: int) -> None:
    quantized = collection(weight_dtype=torch.bfloat16).quantize(bits)
    assert [table.bits for table in quantized.tables] == [bits]
    new = collection(weight_dtype=torch.bfloat16, bits=bits)
    assert new.nbytes == quantized.nbytes
    new.load_state_dict(quantized.state_dict())
    out = new({"a": (INDICES, OFFSETS)})
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, quantized({"a": (INDICES, OFFSETS)}))
    assert rk.EmbeddingBagCollection(quantized.tables).table("a").shape == quantized.table("a").shape
