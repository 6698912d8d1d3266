"""Packed int8 layers: their layout, chains of them, and what is refused. And wrong arguments of all int8 operators."""

from __future__ import annotations

import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import named

from recsys_kernels import testing
from recsys_kernels.backends import selection
from recsys_kernels.testing import Int8Sample, assert_matches, expected_int8_linear

TESTS = Path(__file__).parents[3]
pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES[:3]
DYNAMIC, STATIC, WEIGHT_ONLY = 0, 1, 2
NONE, RELU, GELU, SIGMOID, SILU = range(5)


def operator(name: str, *args: Any) -> torch.Tensor:
    return selection.implementation(name, args[0])(*args)


def pack(*layer: Any) -> torch.Tensor:
    return operator("int8_pack", *layer)


def chain(*args: Any) -> torch.Tensor:
    return operator("int8_chain", *args)


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def layer_of(
    in_features: int, out_features: int, group: int = 0, scheme: int = DYNAMIC, activation: int = NONE, seed: int = 0
) -> tuple[Any, ...]:
    """A layer as int8_pack takes it, whose outputs are about as large as its inputs."""
    rng = draw(seed + in_features * 1000 + out_features)
    weight = torch.randint(-127, 128, (out_features, in_features), generator=rng, dtype=torch.int8)
    scale = (torch.rand(out_features, -(-in_features // group) if group else 1, generator=rng) + 0.5) / 73
    bias = torch.randn(out_features, generator=rng) if out_features % 2 else None
    qparams = torch.tensor([0.02, 117.0]) if scheme == STATIC else None
    return weight, scale / in_features**0.5, group, bias, qparams, scheme, activation


# ---- layout ---------------------------------------------------------------------------------------------------------


def bytes_of(
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    group: int,
    bias: torch.Tensor | None,
    input_qparams: torch.Tensor | None,
    scheme: int,
    activation: int,
) -> bytes:
    """A packed layer by the documented layout, byte by byte."""
    channels, width = weight.shape
    padded = -(-channels // 16) * 16
    scale, zero_point = (1.0, 0) if input_qparams is None else (input_qparams[0].item(), int(input_qparams[1]))
    numbers = (0x384B4352, 1, width, channels, group, scheme, activation, int(bias is not None))
    out = struct.pack("<8ifi24x", *numbers, scale, zero_point)
    assert out[:4] == b"RCK8"
    scales, sums = [], []
    for number in range(weight_scale.shape[1]):
        part = weight[:, number * group : (number + 1) * group] if group else weight
        fill = [0] * (padded - channels)
        scales += [*weight_scale[:, number].tolist(), *fill]
        sums += [*part.sum(1, dtype=torch.int64).tolist(), *fill]
    biases = [0.0] * padded if bias is None else [*bias.tolist(), *[0.0] * (padded - channels)]
    out += struct.pack(f"<{len(scales)}f", *scales) + struct.pack(f"<{padded}f", *biases)
    out += struct.pack(f"<{len(sums)}i", *sums)
    rows = weight.tolist()
    for block in range(0, channels, 16):
        for k in range(0, width, 4):
            for row in range(block, block + 16):
                four = [rows[row][i] if row < channels and i < width else 0 for i in range(k, k + 4)]
                out += struct.pack("4b", *four)
    return out


@pytest.mark.parametrize("group", [0, 32, 64, 128])
def test_layout(implementation: str, group: int) -> None:
    for in_features, out_features in ((1, 1), (3, 5), (4, 16), (5, 17), (33, 31), (130, 33), (257, 48)):
        for scheme, activation in ((DYNAMIC, NONE), (STATIC, RELU), (WEIGHT_ONLY, SILU)):
            layer = layer_of(in_features, out_features, group, scheme, activation)
            packed = pack(*layer)
            assert (packed.dtype, packed.dim(), packed.is_contiguous()) == (torch.uint8, 1, True)
            assert packed.numel() % 64 == 0
            assert packed.numpy().tobytes() == bytes_of(*layer), (in_features, out_features, scheme)


def test_layout_of_tensors_with_gaps(implementation: str) -> None:
    weight, scale, _, bias, *rest = layer_of(50, 21)
    wide = weight.repeat_interleave(2, 1)[:, ::2]
    assert not wide.is_contiguous()
    assert torch.equal(pack(wide, scale, 0, bias.repeat(2, 1).t()[:, 1], *rest), pack(weight, scale, 0, bias, *rest))
    one = torch.full((1, 1), 0.5)
    assert torch.equal(pack(weight, one.expand(21, 1), 0, bias, *rest), pack(weight, one.repeat(21, 1), 0, bias, *rest))


def test_packing_changes_nothing(implementation: str) -> None:
    layer = layer_of(50, 21, 32, STATIC)
    before = [t.clone() for t in layer if isinstance(t, torch.Tensor)]
    packed = pack(*layer)
    copy = packed.clone()
    x = torch.randn(3, 50)
    given = x.clone()
    chain(x, packed, 21, torch.float32)
    assert all(
        torch.equal(a, b) for a, b in zip(before, (t for t in layer if isinstance(t, torch.Tensor)), strict=True)
    )
    assert torch.equal(packed, copy)
    assert torch.equal(x, given)


# ---- chains ---------------------------------------------------------------------------------------------------------

WIDTHS = ((7, 5), (40, 16, 33), (1, 1, 1), (100, 64, 32, 16, 1), (13, 300, 2, 129), (515, 17, 515))


def expected_chain(x: torch.Tensor, layers: list[tuple[Any, ...]]) -> torch.Tensor:
    """Layer by layer in float64, each result rounded to float32 as it goes into the next one."""
    for weight, scale, *rest in layers:
        x = expected_int8_linear(Int8Sample("", x, weight, scale, *rest)).float()
    return x.double()


@pytest.mark.parametrize("scheme", [DYNAMIC, STATIC, WEIGHT_ONLY])
@pytest.mark.parametrize("group", [0, 32])
def test_chains(implementation: str, scheme: int, group: int) -> None:
    for widths in WIDTHS:
        layers = [
            layer_of(k, n, group, scheme, (number + len(widths)) % 5) for number, (k, n) in enumerate(pairwise(widths))
        ]
        packed = torch.cat([pack(*layer) for layer in layers])
        for rows in (0, 1, 2, 5, 16, 70, 300):
            x = torch.randn(rows, widths[0], generator=draw(rows))
            out = chain(x, packed, widths[-1], torch.float32)
            one_by_one = x
            for layer in layers:
                one_by_one = operator("int8_linear", one_by_one, *layer, torch.float32)
            assert torch.equal(out, one_by_one), (widths, rows)
            if rows == 0:
                assert out.shape == (0, widths[-1])
                continue
            wanted = expected_chain(x, layers)
            if scheme == WEIGHT_ONLY:
                assert_matches(out, wanted)
                continue
            # A value that a bit of rounding moves over a half comes out a whole step away.
            error = (out.double() - wanted).abs() / wanted.abs().max()
            assert error.max() < 0.02, (widths, rows, error.max())
            assert error.mean() < 1e-4, (widths, rows, error.mean())


def test_static_chains_are_exact(implementation: str) -> None:
    """Whole steps and powers of two: every value between the layers is exact, so that no rounding hides a mistake."""
    rng = draw(3)
    widths, zero_points, steps = (37, 50, 21, 9), (100, 0, 128), (2.0**-3, 2.0**-1, 2.0**0)
    weights = [torch.randint(-4, 5, (n, k), generator=rng, dtype=torch.int8) for k, n in pairwise(widths)]
    biases = [torch.randint(-20, 20, (n,), generator=rng).float() for n in widths[1:]]
    parts = [
        pack(weight, torch.full((len(weight), 1), 0.25), 0, bias, torch.tensor([step, zero]), STATIC, RELU)
        for weight, bias, step, zero in zip(weights, biases, steps, zero_points, strict=True)
    ]
    for rows in (1, 6, 40, 131):
        x = torch.randint(-300, 400, (rows, 37), generator=rng) / 16
        y = x.double().numpy()
        for weight, bias, step, zero in zip(weights, biases, steps, zero_points, strict=True):
            q = np.clip(np.rint(y / step), -zero, 255 - zero)
            y = np.maximum(q @ weight.double().numpy().T * step / 4 + bias.double().numpy(), 0)
        assert np.array_equal(chain(x, torch.cat(parts), 9, torch.float32).double().numpy(), y), rows
        assert y.any()


def test_chains_of_mixed_layers(implementation: str) -> None:
    layers = [
        layer_of(33, 20, 32, WEIGHT_ONLY, GELU),
        layer_of(20, 90, 0, STATIC, RELU),
        layer_of(90, 7, 64, DYNAMIC, SIGMOID),
    ]
    packed = torch.cat([pack(*layer) for layer in layers])
    x = torch.randn(11, 33, generator=draw(4))
    error = (chain(x, packed, 7, torch.float32).double() - expected_chain(x, layers)).abs()
    assert error.max() < 0.01
    assert error.mean() < 1e-4


def test_types_and_strides_of_a_chain(implementation: str) -> None:
    """Only its ends are rounded to 16 bits."""
    layers = [layer_of(40, 60, 0, DYNAMIC, RELU), layer_of(60, 9)]
    packed = torch.cat([pack(*layer) for layer in layers])
    base = torch.randn(12, 81, generator=draw(5))
    for given_type in DTYPES:
        x = base.to(given_type)[::2, 1::2]
        full = chain(x.float().contiguous(), packed, 9, torch.float32)
        for dtype in DTYPES:
            assert torch.equal(chain(x, packed, 9, dtype), full.to(dtype))
            assert torch.equal(chain(x.t().contiguous().t(), packed, 9, dtype), full.to(dtype))


def test_chains_do_not_depend_on_threads(isa: str, threads: None) -> None:
    for widths, rows in (((479, 512, 256, 1), 300), ((64, 1000, 1000), 9), ((2000, 1500), 2)):
        layers = [layer_of(k, n, 0, DYNAMIC, RELU) for k, n in pairwise(widths)]
        packed = torch.cat([pack(*layer) for layer in layers])
        x = torch.randn(rows, widths[0], generator=draw(6))
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(chain(x, packed, widths[-1], torch.float32))
        assert all(torch.equal(results[0], other) for other in results[1:])


# ---- what is refused ------------------------------------------------------------------------------------------------


def good_chain() -> torch.Tensor:
    return torch.cat([pack(*layer_of(40, 20, 32, STATIC)), pack(*layer_of(20, 5))])


def with_number(packed: torch.Tensor, position: int, value: int, start: int = 0) -> torch.Tensor:
    """A copy with another 32-bit number in the header of the layer that starts at a byte."""
    out = packed.clone()
    out[start : start + 64].view(torch.int32)[position] = value
    return out


def test_truncated_packs_are_refused(implementation: str) -> None:
    packed, x = good_chain(), torch.randn(3, 40)
    first = pack(*layer_of(40, 20, 32, STATIC)).numel()
    whole = chain(x, packed, 5, torch.float32)
    for length in range(packed.numel()):
        if length % 61 and length % 64 and length not in (first - 1, first + 1, packed.numel() - 1):
            continue
        with pytest.raises(RuntimeError, match=r"packed|layer"):
            # The first layer alone is good, but it gives another number of features.
            pytest.fail(f"{length} of {packed.numel()} bytes: {chain(x, packed[:length], 5, torch.float32)}")
    with pytest.raises(RuntimeError, match="packed"):
        chain(x, torch.cat([packed, packed[:32]]), 5, torch.float32)
    with pytest.raises(RuntimeError, match="packed"):
        chain(x, torch.cat([packed, torch.zeros(64, dtype=torch.uint8)]), 5, torch.float32)
    assert torch.equal(chain(x, packed, 5, torch.float32), whole)


LARGEST = 2**31 - 1
ALTERED = {
    "magic": (0, 0x384B4353),
    "magic 0": (0, 0),
    "version 0": (1, 0),
    "version 2": (1, 2),
    "no in_features": (2, 0),
    "negative in_features": (2, -40),
    "other in_features": (2, 39),
    "in_features of the same padding": (2, 38),
    "too many in_features": (2, 65537),
    "largest in_features": (2, LARGEST),
    "no out_features": (3, 0),
    "negative out_features": (3, -1),
    "other out_features": (3, 21),
    "more out_features": (3, 33),
    "largest out_features": (3, LARGEST),
    "almost largest out_features": (3, LARGEST - 15),
    "smallest out_features": (3, -LARGEST - 1),
    "other group": (4, 64),
    "no group": (4, 0),
    "odd group": (4, 16),
    "negative group": (4, -32),
    "scheme": (5, 3),
    "negative scheme": (5, -1),
    "activation": (6, 5),
    "negative activation": (6, -1),
    "scale 0": (8, 0),
    "negative scale": (8, struct.unpack("<i", struct.pack("<f", -0.5))[0]),
    "infinite scale": (8, 0x7F800000),
    "scale NaN": (8, 0x7FC00000),
    "zero point": (9, 256),
    "negative zero point": (9, -1),
}


@pytest.mark.parametrize("name", ALTERED)
def test_altered_headers_are_refused(implementation: str, name: str) -> None:
    packed, x = good_chain(), torch.randn(3, 40)
    position, value = ALTERED[name]
    with pytest.raises(RuntimeError, match=r"packed|layer|group|scheme|activation|scale|zero point|input"):
        pytest.fail(f"accepted: {chain(x, with_number(packed, position, value), 5, torch.float32)}")


def test_second_layers_are_checked_too(implementation: str) -> None:
    packed, x = good_chain(), torch.randn(3, 40)
    start = packed.numel() - pack(*layer_of(20, 5)).numel()
    for name, (position, value) in {"width": (2, 24), "version": (1, 9), "rows": (3, 17), "scheme": (5, 1)}.items():
        altered = with_number(packed, position, value, start)
        if name == "scheme":
            altered = with_number(altered, 8, 0, start)  # a static layer with a scale of 0
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was accepted: {chain(x, altered, 5, torch.float32)}")


def test_packs_that_are_no_packs(implementation: str) -> None:
    packed, x = good_chain(), torch.randn(3, 40)
    bad = {
        "empty": (x, packed[:0], 5, torch.float32),
        "another type": (x, packed.to(torch.int8), 5, torch.float32),
        "floats": (x, packed.view(torch.float32), 5, torch.float32),
        "2-D": (x, packed.reshape(2, -1), 5, torch.float32),
        "other out_features": (x, packed, 6, torch.float32),
        "out_features of the first layer": (x, packed, 20, torch.float32),
        "negative out_features": (x, packed, -1, torch.float32),
        "wrong order": (x, torch.cat([pack(*layer_of(20, 5)), pack(*layer_of(40, 20))]), 20, torch.float32),
        "narrow input": (x[:, :39], packed, 5, torch.float32),
        "wide input": (torch.randn(3, 41), packed, 5, torch.float32),
        "1-D input": (x[0], packed, 5, torch.float32),
        "3-D input": (x[None], packed, 5, torch.float32),
        "float64 input": (x.double(), packed, 5, torch.float32),
        "integer input": (x.int(), packed, 5, torch.float32),
        "float64 output": (x, packed, 5, torch.float64),
        "integer output": (x, packed, 5, torch.int8),
    }
    for name, args in bad.items():
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was accepted: {chain(*args)}")
        if args[0].dim() == 2:
            with pytest.raises(RuntimeError):
                pytest.fail(f"{name} was accepted without rows: {chain(args[0][:0], *args[1:])}")


def test_packs_at_odd_addresses(implementation: str) -> None:
    """Refused or served, never misread."""
    packed, x = good_chain(), torch.randn(3, 40)
    wanted = chain(x, packed, 5, torch.float32)

    def same_or_refused(moved: torch.Tensor) -> bool:
        try:
            out = chain(x, moved, 5, torch.float32)
        except RuntimeError as error:
            return "packed must be" in str(error)
        return torch.equal(out, wanted)

    for shift in (1, 2, 3, 4, 16, 32, 63, 64):
        moved = torch.cat([torch.zeros(shift, dtype=torch.uint8), packed])[shift:]
        assert same_or_refused(moved), shift
        if shift % 4 == 0:
            assert torch.equal(chain(x, moved, 5, torch.float32), wanted)
    assert same_or_refused(torch.stack([packed, packed], 1)[:, 0])


def test_random_bytes_are_refused_or_read_within_their_bounds(implementation: str) -> None:
    """Headers with random numbers of which most are plausible; what is accepted runs (under sanitizers as well)."""
    rng, packed, x = draw(9), good_chain(), torch.randn(3, 40)
    values = torch.tensor([-1, 0, 1, 2, 3, 4, 5, 16, 17, 20, 21, 32, 33, 40, 41, 64, 128, 65536, LARGEST])
    accepted = 0
    for _ in range(1500):
        altered = packed.clone()
        header = altered[:64].view(torch.int32)
        for _ in range(int(torch.randint(1, 4, (1,), generator=rng))):
            at = int(torch.randint(0, 16, (1,), generator=rng))
            header[at] = values[int(torch.randint(0, len(values), (1,), generator=rng))]
        try:
            out = chain(x, altered, 5, torch.float32)
        except RuntimeError:
            continue
        accepted += 1
        assert out.shape == (3, 5)
    assert 0 < accepted < 1000


def wrong_layers() -> dict[str, tuple[Any, ...]]:
    """Layers that int8_pack and int8_linear refuse."""
    weight, scale, _, bias, *_ = layer_of(40, 21)
    grouped = layer_of(40, 21, 32)[1]
    pair = torch.tensor([0.1, 100.0])
    inf, nan = float("inf"), float("nan")
    rest = (None, DYNAMIC, NONE)
    return {
        "uint8 weight": (weight.to(torch.uint8), scale, 0, bias, *rest),
        "float weight": (weight.float(), scale, 0, bias, *rest),
        "1-D weight": (weight[0], scale, 0, None, *rest),
        "3-D weight": (weight[None], scale, 0, bias, *rest),
        "no rows": (weight[:0], scale[:0], 0, None, *rest),
        "no columns": (weight[:, :0], scale, 0, bias, *rest),
        "too many columns": (torch.zeros(1, 65537, dtype=torch.int8), scale[:1], 0, None, *rest),
        "half scale": (weight, scale.half(), 0, bias, *rest),
        "double scale": (weight, scale.double(), 0, bias, *rest),
        "1-D scale": (weight, scale[:, 0], 0, bias, *rest),
        "fewer scales": (weight, scale[:20], 0, bias, *rest),
        "more scales": (weight, torch.ones(22, 1), 0, bias, *rest),
        "one scale": (weight, scale[:1], 0, bias, *rest),
        "transposed scale": (weight, scale.t(), 0, bias, *rest),
        "scales of groups without groups": (weight, grouped, 0, bias, *rest),
        "groups with one scale": (weight, scale, 32, bias, *rest),
        "groups of another length": (weight, grouped, 64, bias, *rest),
        "group 16": (weight, torch.ones(21, 3), 16, bias, *rest),
        "group 40": (weight, scale, 40, bias, *rest),
        "group -1": (weight, scale, -1, bias, *rest),
        "half bias": (weight, scale, 0, bias.half(), *rest),
        "shorter bias": (weight, scale, 0, bias[:20], *rest),
        "longer bias": (weight, scale, 0, torch.ones(22), *rest),
        "2-D bias": (weight, scale, 0, bias[None], *rest),
        "scheme": (weight, scale, 0, bias, None, 3, NONE),
        "negative scheme": (weight, scale, 0, bias, None, -1, NONE),
        "activation": (weight, scale, 0, bias, None, DYNAMIC, 5),
        "negative activation": (weight, scale, 0, bias, None, DYNAMIC, -1),
        "static without qparams": (weight, scale, 0, bias, None, STATIC, NONE),
        "qparams for dynamic": (weight, scale, 0, bias, pair, DYNAMIC, NONE),
        "qparams for weight_only": (weight, scale, 0, bias, pair, WEIGHT_ONLY, NONE),
        "one qparam": (weight, scale, 0, bias, pair[:1], STATIC, NONE),
        "three qparams": (weight, scale, 0, bias, torch.ones(3), STATIC, NONE),
        "2-D qparams": (weight, scale, 0, bias, pair[None], STATIC, NONE),
        "double qparams": (weight, scale, 0, bias, pair.double(), STATIC, NONE),
        **{
            f"qparams {values}": (weight, scale, 0, bias, torch.tensor(values), STATIC, NONE)
            for values in (
                (0.0, 0.0), (-0.0, 0.0), (-0.1, 0.0), (inf, 0.0), (nan, 0.0),
                (0.1, -1.0), (0.1, 256.0), (0.1, 0.5), (0.1, nan), (0.1, inf), (0.1, -1e30), (0.1, 1e30),
            )
        },
    }  # fmt: skip


def test_wrong_layers_are_refused(implementation: str) -> None:
    for name, layer in wrong_layers().items():
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was packed: {pack(*layer)}")
        weight = layer[0]
        for rows in (3, 0):
            x = torch.randn(rows, weight.shape[-1])
            with pytest.raises(RuntimeError):
                pytest.fail(f"{name} was accepted: {operator('int8_linear', x, *layer, torch.float32)}")


def test_wrong_inputs_of_a_layer_are_refused(implementation: str) -> None:
    layer, x = layer_of(40, 21), torch.randn(3, 40)
    bad = {
        "narrow": x[:, :39],
        "wide": torch.randn(3, 41),
        "transposed": x.t(),
        "1-D": x[0, :20],
        "0-D": x[0, 0],
        "3-D": torch.randn(2, 40, 3),
        "no columns": x[:, :0],
        "double": x.double(),
        "int": x.int(),
        "int8": x.char(),
        "complex": x.cfloat(),
    }
    for name, given in bad.items():
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was accepted: {operator('int8_linear', given, *layer, torch.float32)}")
    for dtype in (torch.float64, torch.int8, torch.int32, torch.bool):
        with pytest.raises(RuntimeError):
            operator("int8_linear", x, *layer, dtype)
    with pytest.raises(RuntimeError, match=r"40.*39|39.*40"):
        operator("int8_linear", bad["narrow"], *layer, torch.float32)


def test_most_columns_are_served(implementation: str) -> None:
    """65536, the most for which sums of every row and every zero point fit into int32."""
    weight = torch.full((1, 65536), -128, dtype=torch.int8)
    layer = (weight, torch.ones(1, 1), 0, None, torch.tensor([1.0, 255.0]), STATIC, NONE)
    x = torch.full((1, 65536), -255.0)
    assert operator("int8_linear", x, *layer, torch.float32).item() == 255 * 128 * 65536
    assert chain(x, pack(*layer), 1, torch.float32).item() == 255 * 128 * 65536


def test_samples_through_packs_at_guard_pages() -> None:
    """Packs, inputs and operands at the edge of their memory, in a process of its own: a byte read too far ends it."""
    script = f"""
import sys
sys.path[:0] = [{str(TESTS / "sanitize")!r}, {str(TESTS)!r}]
import torch
from guard_pages import guarded, _mapped
from support import isa_levels
from recsys_kernels import testing
from recsys_kernels.backends.registry import native
torch.set_num_threads(1)
ops = torch.ops.recsys_kernels
calls = 0
samples = [s for s in testing.int8_linear_samples(torch.float32)[::3] if s.input.numel()]
samples += testing.int8_linear_samples(torch.bfloat16)[1::9]
for level in isa_levels():
    native.select_isa(level)
    for number, sample in enumerate(samples):
        print(level, sample, file=sys.stderr, flush=True)
        rows = sample.input.reshape(-1, sample.weight.shape[1])
        wanted = ops.int8_linear(rows, *sample.layer, sample.dtype)
        at_end = number % 4 != 3
        x = guarded(rows, at_end)
        layer = [guarded(t, at_end) if isinstance(t, torch.Tensor) else t for t in sample.layer]
        packed = guarded(ops.int8_pack(*layer), at_end)
        assert torch.equal(ops.int8_linear(x, *layer, sample.dtype), wanted)
        assert torch.equal(ops.int8_chain(x, packed, len(sample.weight), sample.dtype), wanted)
        calls += 3
        _mapped.clear()
print(calls)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600)
    last = done.stderr.splitlines()[-1] if done.stderr else ""
    assert done.returncode == 0, f"exit status {done.returncode} at: {last}\n{done.stderr[-2000:]}"
    assert int(done.stdout) > 2000


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_a_sample_do_not_depend_on_each_other(isa: str, dtype: torch.dtype) -> None:
    for sample in testing.int8_linear_samples(dtype)[::5]:
        rows = sample.input.reshape(-1, sample.weight.shape[1])
        with named(sample):
            whole = operator("int8_linear", rows, *sample.layer, sample.dtype)
            for first in range(0, len(rows), 3):
                part = operator("int8_linear", rows[first : first + 3], *sample.layer, sample.dtype)
                assert torch.equal(part, whole[first : first + 3])
