"""The int8 matmul operators: one layer, packed layers, chains of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from support import named

from recsys_kernels import _backends, testing
from recsys_kernels.testing import Int8Sample, assert_matches, expected_int8_linear

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES[:3]


def linear(*args: Any) -> torch.Tensor:
    return _backends.implementation("int8_linear", args[0])(*args)


def pack(*args: Any) -> torch.Tensor:
    return _backends.implementation("int8_pack", args[0])(*args)


def chain(*args: Any) -> torch.Tensor:
    return _backends.implementation("int8_chain", args[0])(*args)


@lru_cache
def samples(dtype: torch.dtype) -> list[tuple[Int8Sample, torch.Tensor]]:
    """Every sample of a type with what it should give."""
    return [(sample, expected_int8_linear(sample)) for sample in testing.int8_linear_samples(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample_against_numpy(implementation: str, dtype: torch.dtype) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            out = linear(*sample.args)
            assert out.dtype == sample.dtype
            assert out.is_contiguous()
            assert_matches(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_give_the_same(implementation: str, dtype: torch.dtype) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            rows = sample.input.reshape(-1, sample.weight.shape[1])
            out = chain(rows, pack(*sample.layer), sample.weight.shape[0], sample.dtype)
            assert (out.dtype, out.is_contiguous()) == (sample.dtype, True)
            assert_matches(out, wanted.reshape(out.shape))
