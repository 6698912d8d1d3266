"""Hostile indices and offsets: either the documented exception or the result of the reference, never a crash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recsys_kernels as rk
from recsys_kernels.backends.registry import ISA_LEVELS, native, operators
from recsys_kernels.testing import assert_matches

BATCH = 10  # inputs in one of hypothesis's examples, whose own bookkeeping takes longer than ten lookups
CASES = 10_000

_OPERATORS = (
    "embedding_bag",
    "embedding_bag_max",
    "embedding_bag_backward",
    "embedding_bag_weights_backward",
    "quantized_embedding_bag",
    "embedding_bag_collection",
)
_INT64, _INT32 = 2**63 - 1, 2**31 - 1


def numbers(limit: int) -> st.SearchStrategy[int]:
    """Mostly 0 to `limit`, also just outside, and anything that int64 holds."""
    inside = st.integers(0, limit)
    extremes = [-1, limit + 1, -_INT64 - 1, _INT64, _INT32, -_INT32 - 1, 2**32, 2**32 + 1, -(2**32), 2**62, 1 - limit]
    return st.one_of(*[inside] * 9, st.sampled_from(extremes), st.integers(-_INT64 - 1, _INT64))


@st.composite
def inputs(draw: st.DrawFn, rows: int) -> tuple[list[int], list[int]]:
    """Indices, and offsets that are good half of the time."""
    good = st.lists(st.integers(0, max(0, rows - 1)), max_size=12)
    bad = st.lists(numbers(max(0, rows - 1)), max_size=12)
    indices = draw(good if draw(st.integers(0, 2)) else bad)
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return indices, draw(st.lists(numbers(len(indices)), max_size=8))
    offsets = sorted(draw(st.lists(st.integers(0, len(indices)), max_size=8)))
    if kind > 1 and offsets:
        offsets[0] = 0
    return indices, offsets


@st.composite
def examples(draw: st.DrawFn) -> dict[str, Any]:
    rows = draw(st.sampled_from([0, 1, 2, 7, 40]))
    return {
        "operator": draw(st.sampled_from(_OPERATORS)),
        "rows": rows,
        "dim": draw(st.sampled_from([1, 2, 7, 16, 33, 130, 515])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])),
        "types": draw(st.tuples(*[st.sampled_from([torch.int32, torch.int64])] * 2)),
        "mode": draw(st.integers(0, 2)),
        "padding": draw(st.one_of(st.just(-1), st.integers(-1, rows), st.sampled_from([_INT64, 2**32]))),
        "last": draw(st.booleans()),
        "weighted": draw(st.booleans()),
        "matrix": draw(st.integers(0, 7)) == 0,
        # Long enough for two threads (1024 cache lines each) with the wide rows, and past the lookahead of the kernels.
        "repeats": draw(st.sampled_from([1, 1, 1, 20])),
        "threads": draw(st.sampled_from([1, 2])),
        "isa": draw(st.sampled_from(ISA_LEVELS[: ISA_LEVELS.index(str(native.isa_supported())) + 1])),
        "batch": draw(st.lists(inputs(rows), min_size=BATCH, max_size=BATCH)),
    }


def clip(values: list[int], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.int32:
        values = [max(-_INT32 - 1, min(_INT32, v)) for v in values]
    return torch.tensor(values, dtype=dtype)


def arguments(e: dict[str, Any], indices: torch.Tensor, offsets: torch.Tensor | None) -> tuple[Any, ...]:
    """The arguments of the example's operator for one of its inputs."""
    rng = torch.Generator().manual_seed(e["rows"] + 50 * e["dim"])
    weight = torch.randn(e["rows"], e["dim"], generator=rng).to(e["dtype"])
    factors = torch.randn(indices.shape, generator=rng).to(e["dtype"]) if e["weighted"] else None
    num_bags = len(indices) if offsets is None else max(0, len(offsets) - e["last"])
    grad = torch.randn(num_bags, e["dim"], generator=rng).to(e["dtype"])
    bags = (indices, offsets, factors, e["mode"] % 2, e["padding"], e["last"])
    if e["operator"] == "embedding_bag":
        return weight, *bags[:3], e["mode"], *bags[4:]
    if e["operator"] == "embedding_bag_max":
        return weight, indices, offsets, e["padding"], e["last"], e["weighted"]
    if e["operator"] == "embedding_bag_backward":
        return grad, *bags, e["rows"]
    if e["operator"] == "embedding_bag_weights_backward":
        return grad, weight, indices, offsets, *bags[3:]
    bits = 8 if e["weighted"] else 4
    table = rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag.from_pretrained(weight), bits).table
    if e["operator"] == "quantized_embedding_bag":
        return *table, *bags[:3], e["mode"], *bags[4:], e["dtype"]
    # Two features of the float table and, where the types allow, one of the quantized one.
    mixed = e["dtype"] != torch.float64
    plan = [[0, e["dim"], 0, e["mode"], 0, 0], [0, e["dim"], e["dim"], 2 - e["mode"], 0, 0]]
    plan += [[1, e["dim"], 2 * e["dim"], 1, bits, table.exponent]] * mixed
    weights, scales = [weight] + [table.weight] * mixed, [torch.empty(0).half()] + [table.scale_bias] * mixed
    starts = torch.zeros(1, dtype=torch.int64) if offsets is None else offsets
    if e["last"] and len(starts) > 1:  # as many as whole batches have
        starts = starts[: (len(starts) - 1) // len(plan) * len(plan) + 1]
    total = e["dim"] * len(plan)
    return weights, scales, torch.tensor(plan), indices.reshape(-1), starts, bags[2], total, e["dtype"]


def outcome(run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """The result, or the documented exception; any other exception fails the test."""
    try:
        return run(*args)
    except (IndexError, RuntimeError) as error:
        return error


def compare(got: Any, wanted: Any, dtype: torch.dtype) -> str:
    if isinstance(wanted, Exception):
        assert isinstance(got, Exception), f"the reference raised {wanted!r}, the kernel returned {got}"
        if isinstance(got, IndexError) and isinstance(wanted, IndexError):
            assert str(got) == str(wanted)
        return type(got).__name__
    assert not isinstance(got, Exception), f"the kernel raised {got!r}, the reference returned {wanted}"
    if not isinstance(wanted, tuple):
        got, wanted = (got,), (wanted,)
    for one, two in zip(got, wanted, strict=True):
        if one.dtype == torch.int64:
            assert torch.equal(one, two)
        else:
            # Both sides round to 16 bits, each once.
            assert_matches(one.float(), two.float(), dtype if dtype != torch.float64 else torch.float32)
    return "result"


def test_hostile_indices_and_offsets(threads: None) -> None:
    seen: Counter[str] = Counter()

    @settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(examples())
    def run(e: dict[str, Any]) -> None:
        native.select_isa(e["isa"])
        name = e["operator"]
        kernel = getattr(torch.ops.recsys_kernels, name).default
        for raw_indices, raw_offsets in e["batch"]:
            indices = clip(raw_indices * e["repeats"], e["types"][0])
            offsets: torch.Tensor | None = (
                clip([o * e["repeats"] for o in raw_offsets], torch.int64)
                if all(abs(o) < 2**50 for o in raw_offsets)
                else clip(raw_offsets, torch.int64)
            )
            offsets = clip(offsets.tolist(), e["types"][1])
            if e["matrix"] and name != "embedding_bag_collection":
                indices, offsets = indices.reshape(-1, 2 if indices.numel() % 2 == 0 else 1), None
            args = arguments(e, indices, offsets)
            torch.set_num_threads(e["threads"])
            got = outcome(kernel, args)
            torch.set_num_threads(1)
            wanted = outcome(operators[name].reference, args)
            kind = compare(got, wanted, e["dtype"])
            seen["cases"] += 1
            seen[kind] += 1
            seen[f"{name} {'result' if kind == 'result' else 'error'}"] += 1

    before = native.isa()
    assert before is not None
    try:
        run()
    finally:
        native.select_isa(before)
    print(dict(seen))
    if settings.get_current_profile_name() != "default":
        return  # fewer cases, which are not meant to be a fair mix
    assert seen["cases"] >= CASES
    share = CASES // 10
    assert seen["result"] > 3 * share
    assert seen["IndexError"] > share / 2
    assert seen["RuntimeError"] > share
    for name in _OPERATORS:
        assert seen[f"{name} result"] > share / 5, name
        assert seen[f"{name} error"] > share / 5, name


@pytest.mark.parametrize("operator", _OPERATORS)
def test_values_that_no_type_check_sees(operator: str, isa: str) -> None:
    """The extremes once more, one by one and by hand: each alone at each position among good ones."""
    kernel = getattr(torch.ops.recsys_kernels, operator).default
    example: dict[str, Any] = {
        "operator": operator, "rows": 7, "dim": 33, "dtype": torch.float32, "mode": 0, "padding": -1, "last": False,
        "weighted": True, "isa": isa,
    }  # fmt: skip
    for value in (-1, 7, _INT64, -_INT64 - 1, _INT32, -_INT32 - 1, 2**32, 2**32 + 3, -(2**32) + 3, 2**61, 2**62):
        for position in (0, 5, 17, 18, 199):
            indices, offsets = torch.arange(200) % 7, torch.tensor([0, 3, 50, 50, 199])
            indices[position] = value
            if operator == "embedding_bag_collection":
                offsets = torch.tensor([0, 3, 50, 200])
            with pytest.raises(IndexError, match=f"index {value} at position {position} of indices"):
                kernel(*arguments(example, indices, offsets))
        for position in range(1, 3):
            indices, offsets = torch.arange(200) % 7, torch.tensor([0, 3, 50, 200])
            offsets[position] = value
            if value == 7:
                continue
            with pytest.raises(RuntimeError, match=r"offsets\[\d\] is -?\d+"):
                kernel(*arguments(example, indices, offsets))
