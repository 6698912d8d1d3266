"""Sparsity patterns: names, and masks against torch.nn.utils.prune, sorted lists and values worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils import prune

from recsys_kernels.ops.linear.sparse.patterns import Pattern, keep_mask, parse_pattern

BLOCKS = [f"block{r}x{c}" for r in (1, 4, 16) for c in (1, 4, 16) if r * c > 1]


def scores_of(n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)).abs().to(dtype)


def test_names() -> None:
    assert parse_pattern("unstructured") == Pattern("unstructured", 1, 1, 0, 0)
    assert parse_pattern("block4x1") == Pattern("block4x1", 4, 1, 0, 0)
    assert parse_pattern("block1x16") == Pattern("block1x16", 1, 16, 0, 0)
    assert parse_pattern("2:4") == Pattern("2:4", 1, 1, 2, 4)
    assert parse_pattern("1:32").sparsity == 31 / 32
    assert parse_pattern("block4x1").sparsity is None
    assert len(BLOCKS) == 8
    assert [parse_pattern(name).name for name in BLOCKS] == BLOCKS


@pytest.mark.parametrize(
    "name", ["", "block", "block1x1", "block2x4", "block4x8", "block4", "4:4", "0:4", "4:2", "2:33", "2:4 ", "dense"]
)
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match=r"pattern must be 'unstructured', .*'block16x4'.* or 'n:m'") as error:
        parse_pattern(name)
    assert f"but is {name!r}" in str(error.value)
    with pytest.raises(ValueError, match="pattern must be"):
        keep_mask(scores_of(2, 2), 0.5, name)
    with pytest.raises(TypeError, match="pattern must be a string, but is int"):
        parse_pattern(4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_unstructured_by_hand(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3, 1, 2], [0, 5, 4]], dtype=dtype)
    # round(0.5 * 6) = 3: 0, 1 and 2 go.
    assert keep_mask(scores, 0.5, "unstructured").tolist() == [[True, False, False], [False, True, True]]
    assert keep_mask(scores, 0, "unstructured").all()
    assert keep_mask(scores, 0.99, "unstructured").sum() == 0  # round(5.94) = 6
    assert keep_mask(scores, 0.8, "unstructured").nonzero().tolist() == [[1, 1]]


def test_of_equal_scores_the_first_goes() -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 2.0]])
    assert keep_mask(scores, 0.5, "unstructured").tolist() == [[False, False, False], [True, True, True]]
    assert keep_mask(torch.zeros(2, 4), None, "2:4").tolist() == [[False, False, True, True]] * 2
    assert keep_mask(torch.zeros(8, 2), 0.5, "block4x1").tolist() == [[False, False]] * 4 + [[True, True]] * 4


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_unstructured_is_that_of_torch(sparsity: float) -> None:
    linear = torch.nn.Linear(53, 37)
    mask = keep_mask(linear.weight.detach().abs(), sparsity, "unstructured")
    prune.l1_unstructured(linear, "weight", sparsity)
    assert torch.equal(mask, linear.weight_mask.bool())


def test_blocks_by_hand() -> None:
    # 5 x 2 in blocks of 4 x 1: the lower blocks have one member each. Means: 2.5, 1; 0.5, 9.
    scores = torch.tensor([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0], [4.0, 1.0], [0.5, 9.0]])
    assert keep_mask(scores, 0.25, "block4x1").tolist() == [[True, True]] * 4 + [[False, True]]
    assert keep_mask(scores, 0.5, "block4x1").tolist() == [[True, False]] * 4 + [[False, True]]
    assert keep_mask(scores, 0.75, "block4x1").tolist() == [[False, False]] * 4 + [[False, True]]


def block_reference(scores: torch.Tensor, sparsity: float, rows: int, columns: int) -> torch.Tensor:
    """Block by block in Python."""
    n, k = scores.shape
    places = [(r, c) for r in range(0, n, rows) for c in range(0, k, columns)]
    means = [(scores[r : r + rows, c : c + columns].double().mean().item(), r, c) for r, c in places]
    mask = torch.ones(n, k, dtype=torch.bool)
    for _, r, c in sorted(means)[: round(sparsity * len(places))]:
        mask[r : r + rows, c : c + columns] = False
    return mask


@pytest.mark.parametrize("pattern", BLOCKS)
@pytest.mark.parametrize("shape", [(32, 48), (33, 50), (3, 5), (1, 17), (17, 1), (16, 4)])
def test_blocks(pattern: str, shape: tuple[int, int]) -> None:
    parsed = parse_pattern(pattern)
    for sparsity in (0.0, 0.3, 0.9):
        scores = scores_of(*shape)
        mask = keep_mask(scores, sparsity, pattern)
        assert torch.equal(mask, block_reference(scores, sparsity, parsed.rows, parsed.columns))
        assert torch.equal(mask, keep_mask(scores.t().contiguous().t(), sparsity, parsed))


@pytest.mark.parametrize(("kept", "of"), [(2, 4), (1, 4), (4, 8), (1, 2), (3, 5), (31, 32), (1, 32)])
@pytest.mark.parametrize("k", [1, 3, 4, 8, 31, 64])
def test_groups(kept: int, of: int, k: int) -> None:
    scores = scores_of(6, k)
    mask = keep_mask(scores, None, f"{kept}:{of}")
    assert torch.equal(mask, keep_mask(scores, round(1 - kept / of, 3), f"{kept}:{of}"))
    for row in range(6):
        for start in range(0, k, of):
            group, chosen = scores[row, start : start + of], mask[row, start : start + of]
            assert chosen.sum() == min(kept, len(group))
            if not chosen.all():
                assert group[chosen].min() >= group[~chosen].max()


def test_a_last_group_of_low_scores_keeps_as_many() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0, -3.0, -1.0, -2.0], [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    assert keep_mask(scores, None, "2:4").tolist() == [
        [True, False, True, False, False, True, True],
        [False, False, True, True, False, True, True],
    ]


@given(
    n=st.integers(1, 20),
    k=st.integers(1, 40),
    sparsity=st.floats(0, 1, exclude_max=True),
    values=st.integers(1, 5),
    seed=st.integers(0, 1000),
)
def test_counts_with_many_ties(n: int, k: int, sparsity: float, values: int, seed: int) -> None:
    scores = torch.randint(-values, values, (n, k), generator=torch.Generator().manual_seed(seed)).float()
    mask = keep_mask(scores, sparsity, "unstructured")
    order = sorted(range(n * k), key=lambda i: (scores.view(-1)[i].item(), i))
    assert sorted((~mask).view(-1).nonzero().squeeze(1).tolist()) == sorted(order[: round(sparsity * (n * k))])


def test_empty_matrices() -> None:
    for pattern in ("unstructured", "block4x1", "2:4"):
        for shape in ((0, 4), (4, 0)):
            mask = keep_mask(torch.zeros(shape), 0.5, pattern)
            assert mask.shape == shape
            assert mask.dtype == torch.bool


@pytest.mark.parametrize(
    ("sparsity", "pattern", "error", "message"),
    [
        (1.0, "unstructured", ValueError, r"sparsity must be at least 0 and below 1, but is 1\.0"),
        (-0.1, "block4x1", ValueError, r"sparsity must be at least 0 and below 1, but is -0\.1"),
        (math.nan, "unstructured", ValueError, "sparsity must be at least 0 and below 1, but is nan"),
        (None, "block4x1", ValueError, "sparsity must be given with the pattern 'block4x1'"),
        (0.6, "2:4", ValueError, r"sparsity must be None or 0\.5 with the pattern '2:4', which keeps 2 of every 4"),
        ("0.5", "unstructured", TypeError, "sparsity must be a number, but is str"),
        (True, "unstructured", TypeError, "sparsity must be a number, but is bool"),
    ],
)
def test_sparsities_that_there_are_not(sparsity: Any, pattern: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        keep_mask(scores_of(4, 4), sparsity, pattern)


def test_bad_scores() -> None:
    scores = scores_of(4, 4)
    for value, text in ((math.nan, "nan"), (math.inf, "inf")):
        scores[2, 3] = value
        with pytest.raises(ValueError, match=rf"scores\[2, 3\] is {text}, but must be finite"):
            keep_mask(scores, 0.5, "unstructured")
    with pytest.raises(ValueError, match=r"scores must be a matrix \[N, K\], but have the shape \(4,\)"):
        keep_mask(scores[0], 0.5, "unstructured")
    with pytest.raises(TypeError, match="scores must be floating-point, but are int64"):
        keep_mask(torch.ones(2, 2, dtype=torch.long), 0.5, "unstructured")
