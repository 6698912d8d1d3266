"""Tables of int8 and int4 rows: quantization, lookup, state."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
from safetensors.torch import load_file, save_file

import recsys_kernels as rk
from recsys_kernels import testing
from recsys_kernels.backends import selection
from recsys_kernels.ops.embedding_bag import memory
from recsys_kernels.ops.embedding_bag.reference import MODES
from recsys_kernels.testing import WIDTHS, BagSample, assert_matches, expected_embedding_bag

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = testing.FLOAT_DTYPES
Quantized = rk.QuantizedEmbeddingBag | rk.QuantizedEmbedding


def float_rows(module: Quantized) -> torch.Tensor:
    """The table in float64 by the documented formula, element by element of the saved state."""
    state = module.state_dict()
    q = state["weight"].long()
    if module.bits == 4:
        q = torch.stack([q % 16, q // 16], dim=2).flatten(1)[:, : module.embedding_dim]
    scale, bias = state["scale_bias"].double().unbind(1)
    return (q * scale.unsqueeze(1) + bias.unsqueeze(1)) * 2.0 ** state["exponent"].item()


def steps(module: Quantized) -> torch.Tensor:
    """The distance of two levels of each row, float64 [num_embeddings, 1]."""
    return module.state_dict()["scale_bias"].double()[:, :1] * 2.0 ** module.exponent.item()


def bag_of(weight: torch.Tensor, **options: Any) -> torch.nn.EmbeddingBag:
    return torch.nn.EmbeddingBag.from_pretrained(weight, freeze=True, **options)


def quantize(weight: torch.Tensor, bits: int, **options: Any) -> rk.QuantizedEmbeddingBag:
    return rk.QuantizedEmbeddingBag.from_float(bag_of(weight, **options), bits)


@pytest.fixture(params=[True, False], ids=["scales-apart", "scales-behind-rows"])
def apart(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both layouts of a table in memory; which one a machine gets depends on its caches."""
    use_layout(monkeypatch, request.param)
    return request.param


def use_layout(monkeypatch: pytest.MonkeyPatch, apart: bool) -> None:
    monkeypatch.setattr(memory, "keeps_scales_apart", lambda num_rows, row_bytes: apart)


def shares_memory(module: Quantized) -> bool:
    return module.weight.untyped_storage().data_ptr() == module.scale_bias.untyped_storage().data_ptr()


def assert_same_table(one: Quantized, two: Quantized) -> None:
    ours, theirs = one.state_dict(), two.state_dict()
    assert list(ours) == list(theirs) == ["weight", "scale_bias", "exponent"]
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    assert one.host_exponent() == two.host_exponent() == int(ours["exponent"])
    assert one.dtype == two.dtype
    assert (one.weight.stride(), one.scale_bias.stride()) == (two.weight.stride(), two.scale_bias.stride())


# ---- quantization -----------------------------------------------------------------------------------------------


def tables(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Tables that are hard to quantize."""
    rng = torch.Generator().manual_seed(30)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=rng, dtype=torch.float64)

    found = {f"width-{dim}": normal(40, dim) for dim in WIDTHS}
    found |= {
        "small": normal(50, 19) * 1e-6,
        "large": normal(50, 19) * (1e6 if dtype != torch.float16 else 6e3),
        "mixed-magnitudes": normal(60, 20) * torch.logspace(-8, 4, 60, dtype=torch.float64).unsqueeze(1),
        "positive": normal(40, 21).abs(),
        "far-from-zero": normal(40, 21) * 0.01 + 100.0,
        "constant-rows": torch.linspace(-3, 3, 41, dtype=torch.float64).unsqueeze(1).expand(41, 10),
        "zero-rows": normal(20, 9) * (torch.arange(20) % 2).unsqueeze(1),
        "zero": torch.zeros(6, 8, dtype=torch.float64),
        "one-column": normal(30, 1),
        "one-row": normal(1, 33),
        "no-rows": normal(0, 5),
        "outlier": torch.cat([normal(10, 30), torch.full((10, 1), 1e3, dtype=torch.float64)], dim=1),
        "tiny": normal(8, 6) * 1e-38,
        "strided": normal(30, 40)[::2, 1::2],
        "negative-zero": torch.full((3, 4), -0.0, dtype=torch.float64),
    }
    if dtype != torch.float16:
        found["largest"] = torch.tensor([[3.3e38, -3.3e38, 0.0], [1.0, 2.0, 3.0]], dtype=torch.float64)
    return {name: table.to(dtype) if name != "strided" else _strided(table.to(dtype)) for name, table in found.items()}


def _strided(table: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous (a conversion of the type makes tensors contiguous)."""
    return table.repeat_interleave(2, dim=1)[:, ::2]


def quantized_parts(table: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    module = quantize(table, bits)
    return module.weight, module.scale_bias, module.host_exponent()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_level_gives_the_same_bits(apart: bool, isa: str, dtype: torch.dtype, bits: int) -> None:
    for name, table in tables(dtype).items():
        rows, scale_bias, exponent = quantized_parts(table, bits)
        with rk.backend("reference"):
            wanted_rows, wanted_scale_bias, wanted_exponent = quantized_parts(table, bits)
        assert exponent == wanted_exponent, name
        assert torch.equal(scale_bias.view(torch.int16), wanted_scale_bias.view(torch.int16)), name
        assert torch.equal(rows, wanted_rows), name


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_half_a_step(dtype: torch.dtype, bits: int) -> None:
    levels = 2**bits - 1
    for name, table in tables(dtype).items():
        module = quantize(table, bits)
        exact = table.double()
        error, step = (float_rows(module) - exact).abs(), steps(module)
        # Levels are computed in float32: a value next to a tie may go to the other side.
        assert (error <= step / 2 * (1 + 1e-4) + exact.abs() * 2.0**-24).all(), f"{name}: {(error - step / 2).max()}"
        if exact.numel() == 0 or name in ("far-from-zero", "mixed-magnitudes", "tiny"):
            continue
        # A step is the range over the levels, but for the rounding of scale and bias to 11 bits.
        spread = exact.amax(1, keepdim=True) - exact.amin(1, keepdim=True)
        magnitude = exact.abs().amax(1, keepdim=True)
        smallest = 2.0 ** (module.host_exponent() - 24)
        assert (step <= (spread + magnitude * 2.0**-10) / levels * (1 + 2.0**-10) + 2 * smallest).all(), name


def test_rows_of_every_magnitude_keep_their_precision() -> None:
    for factor in (1e-30, 1e-9, 1e-6, 1e-3, 1.0, 1e3, 1e6, 1e30):
        table = torch.randn(30, 16, generator=torch.Generator().manual_seed(31)) * factor
        error = (float_rows(quantize(table, 8)) - table.double()).abs().amax(1)
        spread = (table.amax(1) - table.amin(1)).double()
        assert (error <= spread / 510 * 1.01).all(), factor


def test_constant_and_zero_rows_are_exact_where_float16_is() -> None:
    table = torch.tensor([[1.5] * 5, [0.0] * 5, [-2.0] * 5, [-0.25] * 5])
    for bits in (8, 4):
        assert torch.equal(quantize(table, bits).to_float().weight, table)
        assert not quantize(torch.zeros(4, 5), bits).to_float().weight.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_infinity_are_refused_by_row(
    implementation: str, threads: None, dtype: torch.dtype, value: float
) -> None:
    table = torch.randn(4000, 17).to(dtype)
    table[3456, 16] = table[2345, 3] = value
    for count in (1, 2):
        torch.set_num_threads(count)
        for bits in (8, 4):
            with pytest.raises(ValueError, match="row 2345 of weight holds NaN or infinity"):
                quantize(table, bits)


def test_float64_beyond_float32_is_refused(implementation: str) -> None:
    table = torch.ones(3, 2, dtype=torch.float64)
    table[1, 1] = 1e300
    with pytest.raises(ValueError, match="row 1 "):
        quantize(table, 8)


def test_bad_arguments() -> None:
    for bits in (2, 16, 0, "8"):
        with pytest.raises(ValueError, match="bits must be 8 or 4"):
            rk.QuantizedEmbeddingBag.from_float(bag_of(torch.randn(3, 4)), bits)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="bits must be 8 or 4"):
            rk.QuantizedEmbedding.from_float(torch.nn.Embedding(3, 4), bits)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="max_norm"):
        rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(3, 4, max_norm=1.0))
    with pytest.raises(NotImplementedError, match="max_norm"):
        rk.QuantizedEmbedding.from_float(torch.nn.Embedding(3, 4, max_norm=1.0))
    bag = quantize(torch.randn(5, 4), 8, mode="max")
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        bag(torch.tensor([[1]]), None, torch.ones(1, 1))
    with pytest.raises(IndexError, match="index 5 at position 1 of indices is out of range for a table with 5 rows"):
        bag(torch.tensor([[1, 5]]))
    with pytest.raises(IndexError, match="index -1 at position 2"):
        rk.QuantizedEmbedding.from_float(torch.nn.Embedding(3, 4))(torch.tensor([[0, 1], [-1, 0]]))
    with pytest.raises(ValueError, match="offsets"):
        bag(torch.tensor([1]))


def test_operators_check_their_arguments(isa: str) -> None:
    """What a module never does, but a caller of the operator may: it must not read or write outside of anything."""
    op = torch.ops.recsys_kernels.quantize_rowwise
    table = torch.randn(6, 10)
    rows, scale_bias = torch.zeros(6, 10, dtype=torch.uint8), torch.zeros(6, 2, dtype=torch.float16)
    op(table, 8, 0, rows, scale_bias)
    bad = {
        "fewer rows": (table, 8, 0, rows[:5], scale_bias[:5]),
        "fewer columns": (table, 8, 0, rows[:, :9], scale_bias),
        "columns of int8 for int4": (table, 4, 0, rows, scale_bias),
        "strided columns": (table, 4, 0, rows[:, ::2], scale_bias),
        "fewer scales": (table, 8, 0, rows, scale_bias[:5]),
        "scales of another type": (table, 8, 0, rows, scale_bias.float()),
        "rows of another type": (table, 8, 0, rows.int(), scale_bias),
        "bits": (table, 5, 0, rows, scale_bias),
        "exponent": (table, 8, 1000, rows, scale_bias),
        "integer table": (table.int(), 8, 0, rows, scale_bias),
        "1-D table": (table[0], 8, 0, rows, scale_bias),
    }
    for name, args in bad.items():
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was accepted: {op(*args)}")
    look = torch.ops.recsys_kernels.quantized_embedding_bag
    bags = (torch.tensor([[1]]), None, None, 0, -1, False, torch.float32)
    for name, args in {
        "wrong width": (rows, scale_bias, 0, 12, 8),
        "wrong bits": (rows, scale_bias, 0, 10, 3),
        "int4 of int8": (rows, scale_bias, 0, 10, 4),
        "fewer scales": (rows, scale_bias[:3], 0, 10, 8),
        "float rows": (table, scale_bias, 0, 10, 8),
        "exponent": (rows, scale_bias, 500, 10, 8),
        "negative width": (rows[:, :0], scale_bias, 0, -1, 4),
    }.items():
        with pytest.raises(RuntimeError):
            pytest.fail(f"{name} was accepted: {look(*args, *bags)}")
    with pytest.raises(RuntimeError):
        look(rows, scale_bias, 0, 10, 8, *bags[:-1], torch.int32)


def test_quantization_makes_no_second_float_table() -> None:
    """Peak memory while 1 M x 64 floats (256 MB) become int8 (64 MB + 4 MB): well below one more float table."""
    script = """
import resource, torch, recsys_kernels as rk
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(100, 64))
bag = torch.nn.EmbeddingBag(1 << 20, 64)
for backend in ("cpu", "reference"):
    with rk.backend(backend):
        before = peak()
        q = rk.QuantizedEmbeddingBag.from_float(bag)
        print(backend, peak() - before, q.nbytes >> 20)
        del q
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    growth = {name: (int(mb), int(held)) for name, mb, held in (line.split() for line in done.stdout.splitlines())}
    assert growth["cpu"][1] == 68
    assert growth["cpu"][0] < 68 + 30, growth
    assert growth["reference"][0] < 68 + 100, growth


# ---- lookup -----------------------------------------------------------------------------------------------------


def quantized_samples(dtype: torch.dtype) -> list[BagSample]:
    unserved = ("transposed-table", "no-columns")
    return [s for s in testing.embedding_bag_samples(dtype) if not s.name.startswith(unserved)]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lookup_is_that_of_the_dequantized_table(
    apart: bool, implementation: str, dtype: torch.dtype, bits: int
) -> None:
    mode_names = {number: name for name, number in MODES.items()}
    for sample in quantized_samples(dtype):
        module = quantize(
            sample.weight,
            bits,
            mode=mode_names[sample.mode],
            include_last_offset=sample.include_last_offset,
            padding_idx=None if sample.padding_idx < 0 else sample.padding_idx,
        )
        assert module.dtype == dtype
        out = module(sample.indices, sample.offsets, sample.per_sample_weights)
        exact = BagSample(sample.name, float_rows(module), *sample.bag_args)  # type: ignore[arg-type]
        try:
            assert out.dtype == dtype
            # Sums are taken in float32 for every type of the output.
            assert_matches(out, expected_embedding_bag(exact), torch.float32 if dtype == torch.float64 else dtype)
        except AssertionError as error:
            raise AssertionError(f"{sample}: {error}") from error


@pytest.mark.parametrize("bits", [8, 4])
def test_embedding_looks_up_indices_of_any_shape(apart: bool, implementation: str, bits: int) -> None:
    for dim in (1, 7, 16, 33, 300):
        module = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(20, dim, padding_idx=3), bits)
        rows = float_rows(module)
        for shape in ((), (0,), (5,), (2, 3), (2, 0, 4), (2, 3, 4, 1)):
            for dtype in (torch.int32, torch.int64):
                ids = torch.randint(0, 20, shape).to(dtype)
                out = module(ids)
                assert out.shape == (*shape, dim)
                assert_matches(out, rows[ids.long()])
        assert_matches(module(torch.tensor([3])), rows[3:4])
        assert module.padding_idx == 3


def test_lookup_agrees_over_threads(apart: bool, isa: str, threads: None) -> None:
    module = quantize(torch.randn(5000, 40), 4, mode="mean")
    indices, offsets = torch.randint(0, 5000, (9000,)), torch.randint(0, 9000, (300,)).sort().values
    offsets[0] = 0
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(module(indices, offsets))
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 2])
def test_gradient_of_per_sample_weights(implementation: str, bits: int, mode: str, padding_idx: int | None) -> None:
    module = quantize(torch.randn(9, 13), bits, mode=mode, padding_idx=padding_idx)
    indices, offsets = torch.tensor([0, 2, 2, 6, 1, 1, 3, 2, 8]), torch.tensor([0, 3, 3, 8])
    grad = torch.randn(4, 13)
    for ids, starts in ((indices, offsets), (indices.reshape(3, 3), None)):
        factors = torch.randn(ids.shape, requires_grad=True)
        upstream = grad[: len(ids) if starts is None else 4]
        (actual,) = torch.autograd.grad(module(ids, starts, factors), factors, upstream)
        rows = float_rows(module)[ids.flatten()]
        bag = torch.arange(3).repeat_interleave(3) if starts is None else torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])
        keep = torch.ones(9) if padding_idx is None else (ids.flatten() != padding_idx).double()
        size = torch.zeros(4, dtype=torch.float64).index_add_(0, bag, keep.double()).clamp(min=1)
        wanted = (rows * upstream.double()[bag]).sum(1) * keep / (size[bag] if mode == "mean" else 1.0)
        assert_matches(actual, wanted.reshape(ids.shape))


# ---- conversion and state -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_to_float(implementation: str, bits: int, dtype: torch.dtype) -> None:
    bag = torch.nn.EmbeddingBag(12, 7, mode="max", padding_idx=-2, include_last_offset=True, dtype=dtype).eval()
    module = rk.QuantizedEmbeddingBag.from_float(bag, bits)
    back = module.to_float()
    assert type(back) is rk.EmbeddingBag
    assert (back.mode, back.padding_idx, back.include_last_offset, back.training) == ("max", 10, True, False)
    assert back.weight.dtype == dtype
    assert_matches(back.weight, float_rows(module), torch.float32 if dtype == torch.float64 else dtype)
    again = rk.QuantizedEmbeddingBag.from_float(back, bits).to_float()
    rounding = back.weight.abs().max() * torch.finfo(dtype).eps  # of both floats, half each
    assert (again.weight - back.weight).abs().max() <= steps(module).max() * 0.51 + rounding
    embedding = torch.nn.Embedding(12, 7, padding_idx=4, dtype=dtype)
    quantized = rk.QuantizedEmbedding.from_float(embedding, bits)
    assert type(quantized.to_float()) is torch.nn.Embedding
    assert quantized.to_float().padding_idx == 4
    assert_matches(quantized.to_float()(torch.arange(12)), quantized(torch.arange(12)))


def test_from_float_leaves_the_bag_alone() -> None:
    bag = rk.EmbeddingBag(20, 6, padding_idx=1)
    before = bag.weight.detach().clone()
    module = rk.QuantizedEmbeddingBag.from_float(bag)
    assert torch.equal(bag.weight, before)
    assert bag.weight.requires_grad
    assert not list(module.parameters())
    assert 20 * (6 + 4) <= module.nbytes <= 20 * (8 + 4)


@pytest.mark.parametrize("kind", [rk.QuantizedEmbeddingBag, rk.QuantizedEmbedding])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [1, 9, 60, 64])
def test_state_dict_is_canonical(apart: bool, kind: type[Quantized], bits: int, dim: int, tmp_path: Path) -> None:
    source = (torch.nn.EmbeddingBag if kind is rk.QuantizedEmbeddingBag else torch.nn.Embedding)(25, dim)
    with torch.no_grad():
        source.weight.mul_(1e-4)
    module = kind.from_float(source, bits)  # type: ignore[arg-type]
    state = module.state_dict()
    columns = dim if bits == 8 else (dim + 1) // 2
    found = {name: (tuple(t.shape), t.dtype, t.is_contiguous()) for name, t in state.items()}
    assert found == {
        "weight": ((25, columns), torch.uint8, True),
        "scale_bias": ((25, 2), torch.float16, True),
        "exponent": ((), torch.int64, True),
    }
    # No padding is saved, neither as a view on a larger storage.
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in state.values())
    assert state["exponent"].item() < -10
    fresh = kind(25, dim, bits)
    assert fresh.load_state_dict(state) == ([], [])  # type: ignore[comparison-overlap]
    assert_same_table(fresh, module)
    save_file(state, tmp_path / "table.safetensors")
    other = kind(25, dim, bits)
    other.load_state_dict(load_file(tmp_path / "table.safetensors"))
    assert_same_table(other, module)
    ids = torch.randint(0, 25, (3, 2))
    assert torch.equal(other(ids), module(ids))
    assigned = kind(25, dim, bits)
    assigned.load_state_dict(state, assign=True)
    assert torch.equal(assigned(ids), module(ids))
    with pytest.raises(RuntimeError, match="size mismatch"):
        kind(26, dim, bits).load_state_dict(state)
    with pytest.raises(RuntimeError, match="Missing key"):
        kind(25, dim, bits).load_state_dict({name: t for name, t in state.items() if name != "exponent"})


def copies(module: torch.nn.Module, folder: Path) -> dict[str, Any]:
    """The ways a module is copied or saved."""
    torch.save(module, folder / "module.pt")
    torch.save(module.state_dict(), folder / "state.pt")
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return {
        "copy": copy.copy(module),
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
        "torch.save": torch.load(folder / "module.pt", weights_only=False),
        "torch.save to memory": torch.load(buffer, weights_only=False),
    }


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dim", [9, 60])
def test_copies(apart: bool, bits: int, dim: int, tmp_path: Path) -> None:
    module = quantize(torch.randn(30, dim) * 1e3, bits, mode="sum", padding_idx=2).eval()
    bags = torch.randint(0, 30, (6, 4))
    wanted = module(bags)
    for name, other in copies(module, tmp_path).items():
        assert torch.equal(other(bags), wanted), name
        assert_same_table(other, module)
        assert (other.training, other.padding_idx, other.mode) == (False, 2, "sum"), name
        if name != "copy":
            other.weight.zero_()
            assert torch.equal(module(bags), wanted), f"{name} shares memory"
    fresh = rk.QuantizedEmbeddingBag(30, dim, bits, mode="sum", padding_idx=2)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh(bags), wanted)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_files_and_pickles_move_between_layouts(
    monkeypatch: pytest.MonkeyPatch, first: bool, bits: int, tmp_path: Path
) -> None:
    """What was saved on a machine of one layout is loaded on a machine of the other."""
    use_layout(monkeypatch, first)
    module = quantize(torch.randn(50, 13) * 1e-3, bits, mode="sum")
    assert shares_memory(module) == (not first)
    bags = torch.randint(0, 50, (8, 5))
    wanted = module(bags)
    pickled = pickle.dumps(module)
    torch.save(module, tmp_path / "module.pt")
    save_file(module.state_dict(), tmp_path / "table.safetensors")
    use_layout(monkeypatch, not first)
    loaded = rk.QuantizedEmbeddingBag(50, 13, bits, mode="sum")
    loaded.load_state_dict(load_file(tmp_path / "table.safetensors"))
    others = (loaded, pickle.loads(pickled), torch.load(tmp_path / "module.pt", weights_only=False))
    for other in others:
        assert shares_memory(other) == first
        assert torch.equal(other(bags), wanted)
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in module.state_dict().items())


def test_layout_follows_the_sizes_of_cache_and_row(monkeypatch: pytest.MonkeyPatch) -> None:
    for megabytes, rows, row_bytes, apart in (
        (32, 1000, 128, True),
        (32, 2 << 20, 128, True),
        (32, (2 << 20) + 1, 128, False),
        (4, 2 << 20, 128, False),
        (504, 1000, 128, False),
        (0, 1000, 128, False),
        (32, 1000, 64, False),
        (32, 1000, 127, False),
        (32, 1000, 256, False),
    ):
        monkeypatch.setattr(memory, "_last_level_cache", lambda megabytes=megabytes: megabytes << 20)
        assert memory.keeps_scales_apart(rows, row_bytes) == apart, (megabytes, rows, row_bytes)


@pytest.mark.parametrize("bits", [8, 4])
def test_table_beyond_4_gib(isa: str, bits: int) -> None:
    """Rows whose place does not fit into 32 bits. Only the pages of two rows are ever touched."""
    columns, rows = 1024, (1 << 22) + 100
    dim = columns * 8 // bits
    weight, scale_bias = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(rows, 2, dtype=torch.float16)
    for row, value in ((0, 0x11), (rows - 1, 0x33)):
        weight[row], scale_bias[row] = value, torch.tensor([2.0, 1.0]).half()
    ids = torch.tensor([[rows - 1, 0, rows - 1]])
    for mode, wanted in ((0, (2, 1)), (2, (1, 0))):
        out = torch.ops.recsys_kernels.quantized_embedding_bag(
            weight, scale_bias, 0, dim, bits, ids, None, None, mode, -1, False, torch.float32
        )
        low, high = (0x11, 0x33) if bits == 8 else (1, 3)
        assert (out == wanted[0] * (2 * high + 1) + wanted[1] * (2 * low + 1)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_casts_change_the_output_only(apart: bool, implementation: str, bits: int) -> None:
    source = torch.randn(20, 11)
    for module in (
        quantize(source, bits, mode="sum"),
        rk.QuantizedEmbedding.from_float(torch.nn.Embedding.from_pretrained(source), bits),
    ):
        ids = torch.randint(0, 20, (5, 3))
        before = {name: t.clone() for name, t in module.state_dict().items()}
        rows = float_rows(module)[ids]
        wanted = rows.sum(1) if isinstance(module, rk.QuantizedEmbeddingBag) else rows
        for cast, dtype in (
            (module.half, torch.float16),
            (module.double, torch.float64),
            (lambda m=module: m.to(torch.bfloat16), torch.bfloat16),
            (lambda m=module: m.to("cpu", torch.float16), torch.float16),
            (module.float, torch.float32),
            (lambda m=module: torch.nn.Sequential(m).bfloat16(), torch.bfloat16),
        ):
            cast()
            out = module(ids)
            assert module.dtype == out.dtype == dtype
            assert_matches(out, wanted, torch.float32 if dtype == torch.float64 else dtype)
            state = module.state_dict()
            assert all(torch.equal(state[name], t) and state[name].dtype == t.dtype for name, t in before.items())


def _use_elsewhere(module: Any, bags: torch.Tensor, queue: Any) -> None:
    queue.put((module(bags).tolist(), module.weight.is_shared()))


def test_share_memory(apart: bool) -> None:
    module = quantize(torch.randn(30, 60), 8, mode="sum")
    bags = torch.randint(0, 30, (4, 3))
    wanted = module(bags)
    module.share_memory()
    assert module.weight.is_shared()
    assert module.scale_bias.is_shared()
    assert torch.equal(module(bags), wanted)
    context = torch.multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    torch.set_num_threads(1)
    process = context.Process(target=_use_elsewhere, args=(module, bags, queue))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    result, shared = queue.get()
    assert torch.equal(torch.tensor(result), wanted)
    assert shared


def test_nbytes_counts_what_is_held(apart: bool) -> None:
    assert quantize(torch.randn(1000, 64), 8).nbytes == 1000 * (64 + 4)
    assert quantize(torch.randn(1000, 64), 4).nbytes == 1000 * (32 + 4)
    for bits, dim in ((8, 60), (8, 100), (8, 17), (4, 33)):
        module = quantize(torch.randn(1000, dim), bits)
        columns = dim if bits == 8 else (dim + 1) // 2
        assert 1000 * (columns + 4) <= module.nbytes <= 1000 * (columns * 9 // 8 + 5)


def test_repr_says_what_it_is() -> None:
    assert repr(quantize(torch.randn(3, 4), 4, mode="sum")) == "QuantizedEmbeddingBag(3, 4, bits=4, mode='sum')"
    embedding = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(3, 4, padding_idx=1))
    assert repr(embedding) == "QuantizedEmbedding(3, 4, bits=8, padding_idx=1)"


def test_reference_serves_every_call_of_the_module() -> None:
    """The backend of a call is chosen at the call, not when the module is made."""
    module = quantize(torch.randn(10, 8), 8, mode="sum")
    bags = torch.randint(0, 10, (3, 2))
    wanted = module(bags)
    with rk.backend("reference"):
        assert selection.chosen("quantized_embedding_bag", "cpu") == "reference"
        assert_matches(module(bags), wanted)


@pytest.mark.parametrize("module", ["bag", "embedding"])
@pytest.mark.parametrize("bad", [[float("nan"), 0.0], [float("inf"), 0.0], [-0.5, 0.0], [0.5, float("nan")]], ids=str)
def test_state_with_a_broken_scale_is_refused(module: str, bad: list[float]) -> None:
    """Such a scale makes every prediction that reads the row NaN, or turns its order around."""
    if module == "bag":
        table: Any = rk.QuantizedEmbeddingBag.from_float(torch.nn.EmbeddingBag(6, 4))
    else:
        table = rk.QuantizedEmbedding.from_float(torch.nn.Embedding(6, 4))
    before = {name: value.clone() for name, value in table.state_dict().items()}
    state = {name: value.clone() for name, value in before.items()}
    state["scale_bias"][3] = torch.tensor(bad)
    model = torch.nn.ModuleDict({"users": table})
    for strict in (True, False):
        with pytest.raises(
            RuntimeError, match=r"users.scale_bias of the state_dict .*row 3 of the table.*\(scale, bias\)"
        ):
            model.load_state_dict({f"users.{name}": value for name, value in state.items()}, strict=strict)
    assert all(torch.equal(table.state_dict()[name], value) for name, value in before.items())
    state["scale_bias"][3] = torch.tensor([0.0, -1.0])  # a row of equal values
    table.load_state_dict(state)
