"""Workloads of the benchmarks: the results that a gate expects are those of torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench_support import FLOAT, LINEAR, MLP, SPARSE, SPARSE_INT8, SPARSE_TRAINING

from bench.core import families
from bench.ops.embedding_bag.cases import EmbeddingBagCase, EmbeddingBagWorkload
from bench.ops.linear.int8.cases import Int8LinearCase, Int8LinearWorkload
from bench.ops.linear.sparse.cases import SparseLinearCase, SparseLinearWorkload


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8", "int4"])
def test_expected_is_what_torch_computes(dtype: str) -> None:
    work = EmbeddingBagWorkload(EmbeddingBagCase(dtype, 8, 5, 3, rows=50, tables=2, ids="zipf"), quick=True)
    batch = work.batch(1)
    pooled = [
        torch.nn.functional.embedding_bag(ids.view(5, 3), table.double(), mode="sum")
        for ids, table in zip(batch.indices.chunk(2), work.table, strict=True)
    ]
    torch.testing.assert_close(work.expected(batch), torch.cat(pooled, 1))


def test_batches_change_from_call_to_call() -> None:
    work = EmbeddingBagWorkload(FLOAT, quick=True)
    assert not torch.equal(work.batch(0).indices, work.batch(1).indices)
    assert torch.equal(work.batch(0).indices, work.batch(len(work)).indices)


@pytest.mark.parametrize("case", [LINEAR, MLP], ids=lambda case: case.name)
def test_linear_layers_expect_what_torch_computes(case: Int8LinearCase) -> None:
    work = Int8LinearWorkload(case)
    assert not torch.equal(work.batch(0), work.batch(1))
    for number in (0, 1):
        output = work.net(work.batch(number))
        torch.testing.assert_close(work.expected(work.batch(number)), output.double(), rtol=1e-4, atol=1e-4)
    assert float(output.std()) > 0.1  # or noise would be judged by nothing


def test_operations_are_counted() -> None:
    assert MLP.size == 45 * 33 + 33 * 17 + 17
    assert MLP.amount == 2 * 5 * MLP.size


@pytest.mark.parametrize("case", [SPARSE, SPARSE_INT8, SPARSE_TRAINING], ids=lambda case: case.name)
def test_sparse_layers_expect_what_torch_computes(case: SparseLinearCase) -> None:
    work = SparseLinearWorkload(case)
    assert int((work.weight != 0).sum()) == pytest.approx(case.kept, abs=16)
    assert case.amount == 2 * 7 * case.kept * (3 if case is SPARSE_TRAINING else 1)
    batch, linear = work.batch(1).requires_grad_(), work.linear(trained=True)
    output = linear(batch)
    if case is SPARSE_TRAINING:
        gradients = torch.autograd.grad(output, (batch, linear.weight, linear.bias), work.grad_output)
        output = work.gradients(*gradients)
    torch.testing.assert_close(work.expected(work.batch(1)), output.double(), rtol=1e-4, atol=1e-4)
    assert float(output.detach().std()) > 0.1


def test_names_of_cases_are_unique_and_carry_a_registered_family() -> None:
    cases = families.all_cases()
    assert {family.name for family in families.registered()} == {"embedding_bag", "linear/int8", "linear/sparse"}
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        assert case in families.family_of(case).cases


def test_families_with_names_that_are_taken_are_refused() -> None:
    family = families.family_named("linear/int8")
    with pytest.raises(ValueError, match="registered already"):
        families.register(family)
    with pytest.raises(ValueError, match="'other' name the family 'linear/int8'"):
        families.register(replace(family, name="other"))
    other = type("OtherCase", (Int8LinearCase,), {"family": "other"})
    with pytest.raises(ValueError, match="names that are taken: int8-linear-7x45x33"):
        families.register(replace(family, name="other", case_type=other, cases=(LINEAR, LINEAR)))
    with pytest.raises(KeyError, match="'other' is registered"):
        families.family_named("other")
