"""Damaged packs of sparse layers are refused, or read within their bounds.

``tests/build/test_native.py`` runs these tests under the sanitizers as well.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sparse_support import pack, run_packed

from recsys_kernels.backends import selection

pytestmark = pytest.mark.usefixtures("one_thread")

N, K = 530, 300  # two bands of rows, two blocks and ten chunks of columns, none of the last ones full
DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
HEADER = 64  # bytes
NUMBERS = (-(2**31), -65536, -1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 16, 31, 255, 256, N, K, 65537, 2**24, 2**30, 2**31 - 1)


class Kind(NamedTuple):
    """A kind of layer: what its values are, and how they lie."""

    dtype: torch.dtype = torch.float32
    scheme: int = WEIGHT_ONLY
    block: tuple[int, int] | None = None  # None: single weights
    group: int = 0  # of columns that share a scale


KINDS = {
    "float32": Kind(),
    "float16": Kind(torch.float16),
    "bfloat16, blocks": Kind(torch.bfloat16, block=(4, 1)),
    "float32, blocks": Kind(block=(4, 2)),
    "int8, weight only": Kind(torch.int8),
    "int8, dynamic": Kind(torch.int8, DYNAMIC),
    "int8, static, blocks": Kind(torch.int8, STATIC, (4, 1)),
    "int8, dynamic, groups": Kind(torch.int8, DYNAMIC, group=128),
}


def layer(kind: Kind) -> tuple[Any, ...]:
    """The operands of ``sparse_pack`` but for the last."""
    rng = np.random.default_rng(N)
    rows, columns = kind.block or (1, 1)
    kept = rng.random((-(-N // rows), -(-K // columns))) < 0.05
    kept[:30, :2] = True
    crow = torch.from_numpy(np.concatenate([[0], kept.sum(1).cumsum()]).astype(np.int32))
    col = torch.from_numpy(kept.nonzero()[1].astype(np.int32))
    shape = (len(col), rows, columns) if kind.block else (len(col),)
    quantized = kind.dtype is torch.int8
    values = torch.from_numpy(rng.integers(-127, 128, shape)).to(kind.dtype)
    scale = torch.full((N, -(-K // kind.group) if kind.group else 1), 0.01) if quantized else None
    qparams = torch.tensor([0.02, 128.0]) if kind.scheme == STATIC else None
    return (values, crow, col, N, K, scale, torch.ones(N), qparams, kind.scheme, 1)


def damaged(packed: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A copy in which some bytes or words are others, mostly of those that say where weights are."""
    copy = packed.clone()
    part = copy[: int(rng.choice([HEADER, len(copy) // 4, len(copy)]))]
    width = int(rng.choice([1, 4, 8]))
    words = part[: len(part) // width * width].view({1: torch.uint8, 4: torch.int32, 8: torch.int64}[width])
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(words)))
        if width == 1:
            words[at] = int(rng.integers(256))
        elif rng.random() < 0.5:
            words[at] = int(rng.choice(NUMBERS))
        else:
            words[at] += int(rng.integers(-3, 4))
    return copy


def refusal(x: torch.Tensor, packed: torch.Tensor) -> str | None:
    """The message of the error that a pack is refused with, if it is."""
    try:
        out = run_packed(x, packed, N, torch.float32)
    except RuntimeError as error:
        return str(error)
    assert out.shape == (len(x), N)
    return None


def is_accepted(x: torch.Tensor, packed: torch.Tensor) -> bool:
    message = refusal(x, packed)
    assert message is None or any(text in message for text in ("packed ", "the layer has ", "input must have "))
    return message is None


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("name", KINDS)
def test_damaged_packs_are_refused_or_read_within_their_bounds(isa: str, name: str, few: bool) -> None:
    rng = np.random.default_rng(len(name))
    packed = pack(*layer(KINDS[name]), 0 if few else 1)
    x = torch.randn(3, K)
    assert is_accepted(x, packed)
    accepted = [is_accepted(x, damaged(packed, rng)) for _ in range(400)]
    # What is damaged in weights nobody can see.
    assert 20 < sum(accepted) < 390


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("name", KINDS)
def test_every_number_of_the_header(name: str, few: bool) -> None:
    packed, x = pack(*layer(KINDS[name]), 0 if few else 1), torch.randn(2, K)
    refused = 0
    for at in range(HEADER // 4):
        for number in NUMBERS:
            copy = packed.clone()
            if copy[:HEADER].view(torch.int32)[at] == number:
                continue
            copy[:HEADER].view(torch.int32)[at] = number
            refused += not is_accepted(x, copy)
    assert refused > 200


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_packs_of_another_length(few: bool) -> None:
    packed, x = pack(*layer(KINDS["float32"]), 0 if few else 1), torch.randn(2, K)
    for length in [*range(0, 200, 7), *range(200, len(packed), 1013), len(packed) - 1]:
        assert not is_accepted(x, packed[:length].clone())
    assert not is_accepted(x, torch.cat([packed, packed[:64]]))


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
@pytest.mark.parametrize("count", [1, 9, 70])
def test_damage_is_found_by_every_thread(threads: None, few: bool, count: int) -> None:
    """Each looks at its own part: wherever the wrong number is, the call is an error."""
    torch.set_num_threads(3)
    packed, x = pack(*layer(KINDS["float32"]), 0 if few else 1), torch.randn(40 * count, K)
    words = packed.view(torch.int32)
    numbers = {at: int(words[at]) for at in range(HEADER // 4, len(words) // 8, 61)}
    found = 0
    for at, number in numbers.items():
        words[at] = 2**30 + 5
        found += not is_accepted(x, packed)
        words[at] = number
    assert is_accepted(x, packed)
    assert found > 3


def test_wrong_numbers_are_named_as_damage(isa: str) -> None:
    """One for each thing that kernels go by: the chunks and steps of slabs; bands, blocks and the items of a block."""
    x = torch.randn(2, K)
    few, many = (pack(*layer(KINDS["float32"]), kind) for kind in (0, 1))
    slabs, chunks, padded_n = 34, 10, 544
    order = HEADER + 4 * padded_n
    steps = order + -(-4 * slabs * chunks // 64) * 64
    band_groups = HEADER + 4 * padded_n
    wrong = [(few, order, torch.int32, chunks), (few, order, torch.int32, -1), (few, steps, torch.uint8, 255)]
    streams = band_groups + 64
    wrong += [(many, band_groups + 8, torch.int64, at) for at in (-16, 0, 8, N + 16, 2**40)]
    wrong += [(many, streams + at, torch.int64, number) for at in (0, 8, 16) for number in (-1, 7777777, 2**62)]
    items = streams + -(-24 * 2 * 2 // 64) * 64
    wrong += [(many, items + at, torch.int32, number) for at in (0, 4) for number in (-1, 513, 2**31 - 1)]
    for packed, at, dtype, number in wrong:
        copy = packed.clone()
        copy[at : at + dtype.itemsize].view(dtype)[0] = number
        with pytest.raises(RuntimeError, match="packed is damaged"):
            run_packed(x, copy, N, torch.float32)


@pytest.mark.parametrize("few", [True, False], ids=["few", "many"])
def test_damaged_places(few: bool) -> None:
    """New values for a pack that is damaged: an error, or a pack that is refused or read within its bounds."""
    rng, x = np.random.default_rng(5), torch.randn(2, K)
    values, *rest = layer(KINDS["float32"])
    places = pack(torch.arange(1, len(values) + 1, dtype=torch.int32).view(torch.float32), *rest, 0 if few else 1)
    repack = selection.implementation("sparse_repack", values)
    assert is_accepted(x, repack(places, values, None))
    messages = []
    for _ in range(1500):
        try:
            packed = repack(damaged(places, rng), values, None)
        except RuntimeError as error:
            messages.append(str(error))
        else:
            is_accepted(x, packed)
    assert all("places " in message for message in messages)
    assert 0 < len(messages) < 1400
