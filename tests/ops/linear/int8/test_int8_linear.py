"""The int8 matmul operators: one layer, packed layers, chains of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import named

from recsys_kernels import testing
from recsys_kernels.backends import selection
from recsys_kernels.testing import Int8Sample, assert_matches, expected_int8_linear

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES[:3]
DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
NONE, RELU, GELU, SIGMOID, SILU = range(5)
EPILOGUES = (NONE, RELU, GELU, SIGMOID, SILU)


def linear(*args: Any) -> torch.Tensor:
    return selection.implementation("int8_linear", args[0])(*args)


def pack(*args: Any) -> torch.Tensor:
    return selection.implementation("int8_pack", args[0])(*args)


def chain(*args: Any) -> torch.Tensor:
    return selection.implementation("int8_chain", args[0])(*args)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def integers(low: int, high: int, *size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(low, high + 1, size, generator=draw(seed)).to(torch.int8 if low < 0 else torch.float32)


def qparams(scale: float, zero_point: float) -> torch.Tensor:
    return torch.tensor([scale, zero_point])


def same_bits(one: torch.Tensor, two: torch.Tensor | np.ndarray) -> bool:
    """Equal but for the sign of zero, and NaN where the other has it."""
    two = torch.as_tensor(two)
    return (
        one.dtype == two.dtype
        and torch.equal(one.isnan(), two.isnan())
        and torch.equal(one[~one.isnan()], two[~two.isnan()])
    )


# ---- all options ------------------------------------------------------------------------------------------------


@lru_cache
def samples(dtype: torch.dtype) -> list[tuple[Int8Sample, torch.Tensor]]:
    """Every sample of a type with what it should give."""
    return [(sample, expected_int8_linear(sample)) for sample in testing.int8_linear_samples(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_sample_against_numpy(implementation: str, dtype: torch.dtype) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            out = linear(*sample.args)
            assert (out.dtype, out.is_contiguous()) == (sample.dtype, True)
            assert_matches(out, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_layers_give_the_same(implementation: str, dtype: torch.dtype) -> None:
    for sample, wanted in samples(dtype):
        with named(sample):
            rows = sample.input.reshape(-1, sample.weight.shape[1])
            out = chain(rows, pack(*sample.layer), sample.weight.shape[0], sample.dtype)
            assert (out.dtype, out.is_contiguous()) == (sample.dtype, True)
            assert_matches(out, wanted.reshape(out.shape))


def test_samples_hold_every_option() -> None:
    found = {(s.scheme, s.group, s.activation, s.bias is None) for s, _ in samples(torch.float32)}
    assert found >= {(s, g, a, False) for s in range(3) for g in (0, 32, 64, 128) for a in EPILOGUES}
    assert {s.weight.shape for s, _ in samples(torch.float32)} >= {(1, 1), (1, 7), (17, 1), (333, 415)}


# ---- exact integers ---------------------------------------------------------------------------------------------


def exact(q: torch.Tensor, zero_point: int, weight: torch.Tensor, scale: float = 1.0) -> np.ndarray:
    """float32 of the exact integers, times a power of two."""
    sums = (q.double().numpy().astype(np.int64) - zero_point) @ weight.numpy().astype(np.int64).T
    assert np.abs(sums).max(initial=0) < 2**31
    return sums.astype(np.float32) * np.float32(scale)


SIZES = (*range(1, 36), 47, 48, 49, 63, 64, 65, 66, 79, 80, 81, 127, 128, 129)


def static(q: torch.Tensor, zero_point: int, weight: torch.Tensor, step: float = 1.0, weight_step: float = 1.0) -> Any:
    """A static layer on activations that are whole steps: nothing is rounded but the result."""
    scale = torch.full((weight.shape[0], 1), weight_step)
    x = (q - zero_point) * step
    return linear(x, weight, scale, 0, None, qparams(step, zero_point), STATIC, NONE, torch.float32)


@pytest.mark.parametrize("axis", ["rows", "in_features", "out_features"])
def test_integers_are_exact_at_every_size(implementation: str, axis: str) -> None:
    for size in SIZES:
        rows, width, channels = {
            "rows": (size, 37, 21),
            "in_features": (5, size, 21),
            "out_features": (6, 37, size),
        }[axis]
        q, weight = integers(0, 255, rows, width, seed=size), integers(-128, 127, channels, width, seed=size + 1)
        for zero_point in (0, 101, 255):
            wanted = exact(q, zero_point, weight, 2.0**-9)
            assert same_bits(static(q, zero_point, weight, 2.0**-3, 2.0**-6), wanted), size


@pytest.mark.parametrize("width", [1, 2, 4, 63, 64, 1000, 4096, 65536])
def test_sums_never_saturate(implementation: str, width: int) -> None:
    """The largest products there are: int16 and int32 sums of a careless kernel would overflow or saturate."""
    rows, channels = 5, 18
    for zero_point in (0, 128, 255):
        for value in (0, 255):
            for weights in ((127,), (-128,), (-127,), (127, -128), (127, 127, -127, -128)):
                q = torch.full((rows, width), float(value))
                weight = torch.tensor(weights, dtype=torch.int8).repeat(channels * width)[: channels * width]
                weight = weight.reshape(channels, width)
                assert same_bits(static(q, zero_point, weight), exact(q, zero_point, weight)), (
                    zero_point,
                    value,
                    weights,
                )
        # One of two neighbours is the largest, the other the smallest.
        q = torch.tensor([255.0, 0.0]).repeat(width)[:width].expand(rows, width)
        weight = torch.tensor([-128, 127], dtype=torch.int8).repeat(width)[:width].expand(channels, width)
        assert same_bits(static(q, zero_point, weight), exact(q, zero_point, weight))


def test_sums_of_groups_are_exact(implementation: str) -> None:
    for group in (32, 64, 128):
        for width in (1, 5, group - 1, group, group + 1, 2 * group, 3 * group + 2, 5 * group - 4):
            q, weight = integers(0, 255, 6, width, seed=width), integers(-128, 127, 35, width, seed=group)
            groups = -(-width // group)
            # Powers of two, so that sums of the groups are exact, too.
            scale = 2.0 ** -integers(0, 3, 35, groups, seed=3).float()
            out = linear(q - 77, weight, scale, group, None, qparams(1.0, 77), STATIC, NONE, torch.float32)
            wanted = np.zeros((6, 35))
            for number in range(groups):
                part = slice(number * group, (number + 1) * group)
                wanted += exact(q[:, part], 77, weight[:, part]) * scale[:, number].double().numpy()
            assert np.array_equal(out.double().numpy(), wanted), (group, width)


def quantized(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of float32 by the documented formula: integers without the zero point, scale and zero point of each row."""
    assert x.dtype == np.float32
    step, one, zero = np.float32(1 / 255), np.float32(1), np.float32(0)
    low, high = np.minimum(x.min(1, keepdims=True), zero), np.maximum(x.max(1, keepdims=True), zero)
    scale = np.maximum(high * step - low * step, np.float32(2.0**-100))
    zero_point = np.clip(np.rint(-low * (one / scale)), zero, np.float32(255))
    q = np.rint(np.clip(x * (one / scale), -zero_point, 255 - zero_point))
    assert scale.dtype == zero_point.dtype == q.dtype == np.float32
    return q.astype(np.int64), scale, zero_point


def exact_dynamic(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> np.ndarray:
    """A dynamic layer without bias, to the last bit."""
    q, row_scale, _ = quantized(x.float().numpy())
    sums = q @ weight.numpy().astype(np.int64).T
    return sums.astype(np.float32) * (row_scale * scale[:, 0].numpy())


def hard_rows(width: int) -> dict[str, torch.Tensor]:
    """Rows that are hard to quantize."""
    normal = torch.randn(width, generator=draw(width))
    tiny = torch.finfo(torch.float32).tiny
    return {
        "normal": normal,
        "large": normal * 1e30,
        "small": normal * 1e-25,
        "zero": torch.zeros(width),
        "negative-zero": torch.full((width,), -0.0),
        "constant": torch.full((width,), 1.7),
        "negative-constant": torch.full((width,), -0.3),
        "positive": normal.abs() + 5,
        "negative": -normal.abs() - 5,
        "one-value": torch.nn.functional.one_hot(torch.tensor(width // 2), width) * 3.0,
        "last-value": torch.nn.functional.one_hot(torch.tensor(width - 1), width) * -3.0,
        "denormals": normal * tiny * 0.1,
        "smallest": torch.full((width,), 1e-45),
        "around-the-least-scale": normal * 255 * 2.0**-100,
        "huge": normal.sign() * 1e38,
        "largest": torch.full((width,), torch.finfo(torch.float32).max),
        "both-largest": normal.sign() * torch.finfo(torch.float32).max,
        "huge-and-small": torch.where(torch.arange(width) == width - 1, -1e38, normal),
        "steps": torch.arange(width).float() % 256,
        "half-steps": (torch.arange(width).float() % 256 + 0.5).clamp(max=255) - 0.5 * (torch.arange(width) % 2),
    }


@pytest.mark.parametrize("width", [1, 3, 16, 17, 100, 515])
def test_dynamic_rows_to_the_last_bit(implementation: str, width: int) -> None:
    weight = integers(-127, 127, 19, width, seed=5)
    scale = torch.rand(19, 1, generator=draw(6)) * 1e-6 + 1e-6
    rows = hard_rows(width)
    x = torch.stack(list(rows.values()))
    out = linear(x, weight, scale, 0, None, None, DYNAMIC, NONE, torch.float32)
    wanted = torch.from_numpy(exact_dynamic(x, weight, scale))
    for number, name in enumerate(rows):
        assert out[number].isfinite().all(), name
        assert same_bits(out[number], wanted[number]), f"{name}: {out[number]}, not {wanted[number]}"
        # A row does not depend on those beside it.
        alone = linear(x[number], weight, scale, 0, None, None, DYNAMIC, NONE, torch.float32)
        assert same_bits(alone, out[number]), name
    # Zero and constant rows, by hand: a constant is a whole step, or all of them.
    assert not out[list(rows).index("zero")].any()
    sums = (weight.double().sum(1) * scale[:, 0]).float()
    for name, value in (("constant", 1.7), ("negative-constant", -0.3), ("largest", torch.finfo(torch.float32).max)):
        assert_matches(out[list(rows).index(name)], sums.double() * value)
    # What lies below the least scale counts as zero.
    assert not out[list(rows).index("denormals")].any()


@pytest.mark.parametrize("zero_point", [0, 1, 128, 254, 255])
def test_static_rounding_and_clipping(implementation: str, zero_point: int) -> None:
    """Halves go to the even neighbour, and what is out of the range to its end."""
    x = torch.arange(-300, 300.125, 0.125).unsqueeze(1)
    x = torch.cat([x, torch.tensor([[1e20], [-1e20], [3.4e38], [-3.4e38], [1e-45], [-0.0]])])
    ones = torch.ones(1, 1)
    for scale in (1.0, 0.25, 2.0**-60, 2.0**60):
        for weight in (torch.ones(1, 1, dtype=torch.int8), torch.full((1, 1), -7, dtype=torch.int8)):
            inside = x.clamp(-1e15, 1e15) * scale
            out = linear(inside, weight, ones, 0, None, qparams(scale, zero_point), STATIC, NONE, torch.float32)
            q = np.rint(np.clip(inside.numpy().astype(np.float64) / scale, -zero_point, 255 - zero_point))
            assert np.array_equal(out.double().numpy(), q * scale * weight.item()), scale
    out = linear(x, ones.char(), ones, 0, None, qparams(1.0, zero_point), STATIC, NONE, torch.float32)
    assert np.array_equal(out.numpy(), np.clip(np.rint(x.numpy()), -zero_point, 255 - zero_point))


def test_static_scales_without_a_reciprocal_are_refused(implementation: str) -> None:
    layer = (torch.ones(1, 3, dtype=torch.int8), torch.ones(1, 1), 0, None)
    x = torch.ones(2, 3) * 2.0**-100
    out = linear(x, *layer, qparams(2.0**-100, 0), STATIC, NONE, torch.float32)
    assert torch.equal(out, torch.full((2, 1), 3 * 2.0**-100))
    for scale in (2.0**-101, 1e-45, 0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(RuntimeError, match=r"scale .* must be finite and at least 2\^-100, but is"):
            pytest.fail(f"accepted: {linear(x, *layer, qparams(scale, 0), STATIC, NONE, torch.float32)}")


def test_results_do_not_depend_on_threads(isa: str, threads: None) -> None:
    for rows, width, channels in ((1, 3000, 3001), (3, 2000, 700), (17, 515, 333), (700, 130, 90), (300, 400, 1)):
        x, weight = torch.randn(rows, width, generator=draw(1)), integers(-127, 127, channels, width)
        scale = torch.rand(channels, 1, generator=draw(2))
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            out = linear(x, weight, scale, 0, None, None, DYNAMIC, RELU, torch.float32)
            floats = linear(x, weight, scale, 0, None, None, WEIGHT_ONLY, GELU, torch.bfloat16)
            packed = pack(weight, scale, 0, None, None, DYNAMIC, RELU)
            results.append((out, floats, chain(x, packed, channels, torch.float32)))
        assert all(torch.equal(*pair) for other in results[1:] for pair in zip(results[0], other, strict=True))
        assert same_bits(results[0][0], np.maximum(exact_dynamic(x, weight, scale), 0))
        assert torch.equal(results[0][0], results[0][2])


@st.composite
def layers(draw_one: st.DrawFn) -> dict[str, Any]:
    return {
        "rows": draw_one(st.integers(0, 70)),
        "width": draw_one(st.one_of(st.integers(1, 80), st.sampled_from([255, 256, 257, 515, 1030]))),
        "channels": draw_one(st.integers(1, 140)),
        "gaps": draw_one(st.tuples(st.integers(0, 2), st.integers(1, 3), st.booleans())),
        "magnitude": draw_one(st.sampled_from([1e-44, 1e-30, 1e-3, 1.0, 300.0, 1e37])),
        "shift": draw_one(st.sampled_from([0.0, 0.5, -3.0, 1e3])),
        "relu": draw_one(st.booleans()),
        "dtype": draw_one(st.sampled_from(DTYPES)),
        "seed": draw_one(st.integers(0, 2**30)),
    }


def test_random_layers_to_the_last_bit(isa: str) -> None:
    count = 0

    @settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(layers())
    def run(e: dict[str, Any]) -> None:
        nonlocal count
        first, step, transposed = e["gaps"]
        rng = draw(e["seed"])
        shape = (e["rows"], e["width"] * step + first)
        x = torch.randn(shape[::-1] if transposed else shape, generator=rng) + e["shift"]
        x = (x * e["magnitude"]).to(e["dtype"])
        x = (x.t() if transposed else x)[:, first::step]
        weight = torch.randint(-128, 128, (e["channels"], e["width"]), generator=rng).to(torch.int8)
        scale = torch.rand(e["channels"], 1, generator=rng) * 1e-4 + 1e-6
        out = linear(x, weight, scale, 0, None, None, DYNAMIC, int(e["relu"]), torch.float32)
        if e["rows"] == 0:
            assert out.shape == (0, e["channels"])
            return
        wanted = exact_dynamic(x, weight, scale) if x.isfinite().all() else None
        if wanted is not None:
            assert same_bits(out, np.maximum(wanted, 0) if e["relu"] else wanted)
            count += 1

    run()
    assert count > 200


# ---- types and functions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC, WEIGHT_ONLY])
def test_16_bit_types_are_rounded_once(implementation: str, scheme: int) -> None:
    """Input as its float32 values; output that of float32, rounded to the nearest, ties to even."""
    weight, scale = integers(-127, 127, 33, 50), torch.rand(33, 1, generator=draw(7)) * 0.01
    scale[3] = 1e4  # beyond float16
    bias, range_of_input = torch.randn(33, generator=draw(8)), qparams(0.03, 120) if scheme == STATIC else None
    layer = (weight, scale, 0, bias, range_of_input, scheme, RELU)
    for given_type in DTYPES:
        x = torch.randn(9, 50, generator=draw(9)).to(given_type)
        full = linear(x.float(), *layer, torch.float32)
        for dtype in DTYPES:
            assert same_bits(linear(x, *layer, dtype), full.to(dtype)), (given_type, dtype)
    assert linear(x, *layer, torch.float16)[:, 3].isinf().any()


FUNCTIONS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    NONE: lambda y: y,
    RELU: torch.relu,
    GELU: torch.nn.functional.gelu,
    SIGMOID: torch.sigmoid,
    SILU: torch.nn.functional.silu,
}


@pytest.mark.parametrize("activation", EPILOGUES)
def test_functions(implementation: str, activation: int) -> None:
    """Values go through a weight-only layer with a weight of 1."""
    near = torch.linspace(-20, 20, 40001)
    far = torch.cat([sign * torch.logspace(-44, 38, 2000) for sign in (1, -1)])
    special = torch.tensor([0.0, -0.0, 87.0, 88.0, 89.0, 104.0, -87.0, -88.0, -89.0, -104.0])
    x = torch.cat([near, far, special]).unsqueeze(1)
    one = torch.ones(1, 1)
    out = linear(x, one.char(), one, 0, None, None, WEIGHT_ONLY, activation, torch.float32)
    wanted = FUNCTIONS[activation](x.double())
    # Relative where the result is the input, absolute in the tails, where all of them go to 0.
    error = (out.double() - wanted).abs() / (wanted.abs() + 1.0)
    worst = int(error.argmax())
    assert error.max() < 6e-7, f"of {x[worst].item()}: {out[worst].item()}, not {wanted[worst].item()}"
    if activation in (NONE, RELU):
        assert torch.equal(out.double(), wanted)


@pytest.mark.parametrize("activation", EPILOGUES)
def test_functions_of_infinity_and_nan(implementation: str, activation: int) -> None:
    """The limit, or NaN where torch gives NaN for it."""
    inf = float("inf")
    x = torch.tensor([[inf], [-inf], [float("nan")], [1.0]])
    one = torch.ones(1, 1)
    out = linear(x, one.char(), one, 0, None, None, WEIGHT_ONLY, activation, torch.float32)[:, 0]
    by_torch = FUNCTIONS[activation](x[:, 0])
    limits = {NONE: (inf, -inf), RELU: (inf, 0.0), GELU: (inf, 0.0), SIGMOID: (1.0, 0.0), SILU: (inf, 0.0)}
    for value, limit, theirs in zip(out, limits[activation], by_torch, strict=False):
        assert value == limit or abs(value - limit) < 1e-30 or (value.isnan() and theirs.isnan()), value
    assert out[2].isnan()
    assert_matches(out[3:], by_torch[3:].double())


# ---- NaN and infinity -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC])
def test_nan_and_infinity_make_their_row_nan(implementation: str, scheme: int, value: float) -> None:
    for width, group in ((1, 0), (7, 0), (16, 0), (40, 0), (200, 64)):
        weight = integers(-127, 127, 21, width)
        weight[4] = 0  # times NaN it is NaN
        scale = torch.full((21, -(-width // group) if group else 1), 0.01)
        x = torch.randn(11, width, generator=draw(width))
        bad = x.clone()
        rows = {0: 0, 5: width - 1, 9: width // 2}
        for row, column in rows.items():
            bad[row, column] = value
        bad[9] = value
        for activation in EPILOGUES:
            layer = (weight, scale, group, torch.ones(21), qparams(0.02, 99) if scheme else None, scheme, activation)
            good = linear(x, *layer, torch.float32)
            for dtype in DTYPES:
                out = linear(bad, *layer, dtype)
                for row in range(11):
                    wanted = torch.full((21,), float("nan")) if row in rows else good[row]
                    assert same_bits(out[row], wanted.to(dtype)), (width, activation, dtype, row)
            alone = linear(bad[5], *layer, torch.float32)
            assert alone.isnan().all()


def test_nan_and_infinity_in_float_activations(implementation: str) -> None:
    """``weight_only`` is float arithmetic: infinity times a weight, NaN where it meets a zero or its opposite."""
    weight = torch.tensor([[1, 1, 1], [-1, 2, 1], [1, 0, 3], [0, 0, 0], [1, 1, -1]], dtype=torch.int8)
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, inf, 2.0], [inf, 1.0, -inf], [nan, 1.0, 1.0], [1.0, 2.0, 3.0]])
    out = linear(x, weight, torch.ones(5, 1), 0, None, None, WEIGHT_ONLY, NONE, torch.float32)
    wanted = torch.tensor(
        [[inf, inf, nan, nan, inf], [nan, -inf, nan, nan, inf], [nan] * 5, [6.0, 6.0, 10.0, 0.0, 0.0]]
    )
    assert same_bits(out, wanted)


def test_nan_goes_through_a_chain_and_stays_in_its_row(implementation: str) -> None:
    x = torch.randn(9, 20, generator=draw(1))
    bad = x.clone()
    bad[4, 19] = float("nan")
    for activations in ((RELU, RELU), (GELU, SIGMOID), (SIGMOID, RELU), (SILU, SILU)):
        parts = [
            pack(integers(-127, 127, n, k), torch.full((n, 1), 0.01), 0, None, None, DYNAMIC, activation)
            for (n, k), activation in zip(((30, 20), (6, 30)), activations, strict=True)
        ]
        good, out = (chain(given, torch.cat(parts), 6, torch.float32) for given in (x, bad))
        assert out[4].isnan().all()
        keep = torch.arange(9) != 4
        assert same_bits(out[keep], good[keep])
        assert out[keep].isfinite().all()
