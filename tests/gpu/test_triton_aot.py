"""Compiles the Triton kernels, as the operators launch them, for GPUs that this machine need not have.

The operators run on CPU tensors with their launches recorded; each is then compiled through Triton's own launch path
(specialization of arguments, options) with a driver that only names the target.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton's interpreter is on, and then it compiles nothing", allow_module_level=True)

from support import TRITON  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.backends.driver import DriverBase  # noqa: E402
from triton.runtime import driver  # noqa: E402
from triton_budgets import BUDGETS, TARGETS  # noqa: E402

import recsys_kernels as rk  # noqa: E402
from recsys_kernels.ops.embedding_bag import triton as operators  # noqa: E402
from recsys_kernels.ops.embedding_bag import triton_kernels  # noqa: E402
from recsys_kernels.ops.embedding_bag.reference import MAX, MEAN, SUM  # noqa: E402
from recsys_kernels.ops.linear import triton as linear_triton  # noqa: E402
from recsys_kernels.ops.linear.activation import (  # noqa: E402
    DYNAMIC,
    GELU,
    RELU,
    WEIGHT_ONLY,
)

_GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NamedTarget(DriverBase):
    """A driver of a GPU that is not there: enough to compile, not to run."""

    def __init__(self) -> None:
        self.name = TARGETS[0]

    @classmethod
    def is_active(cls) -> bool:
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return _GPU_TARGETS[self.name]

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError

    def get_current_device(self) -> int:
        # Compiled kernels are kept by device: no number that a GPU of this machine may have.
        return 1000 + TARGETS.index(self.name)

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[_NamedTarget]:
    fake = _NamedTarget()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        # Not reset_active: it asks for the machine's own driver, and there may be none.
        patch.setattr(driver, "_active", fake)
        yield fake


# ---- cases -------------------------------------------------------------------------------------------------------

N, ROWS = 200, 50
F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64


def _indices(dtype: torch.dtype = torch.int64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(N, dtype=dtype), torch.tensor([0, 3, N], dtype=dtype)


def _pool(dtype: torch.dtype, dim: int, mode: int = SUM, weighted: bool = False, padding: int = -1) -> None:
    weights = torch.ones(N, dtype=dtype) if weighted else None
    index = torch.int32 if weighted else torch.int64
    TRITON.embedding_bag(torch.ones(ROWS, dim, dtype=dtype), *_indices(index), weights, mode, padding, False)


def _quantized(dim: int, bits: int) -> None:
    rows = torch.ones(ROWS, dim * bits // 8, dtype=torch.uint8)
    scales = torch.ones(ROWS, 2, dtype=F16)
    TRITON.quantized_embedding_bag(rows, scales, 0, dim, bits, *_indices(), None, SUM, -1, False, F32)


def _argmax(dtype: torch.dtype) -> None:
    TRITON.embedding_bag_max(torch.ones(ROWS, 64, dtype=dtype), *_indices(), 0, False, True)


def _backward(dtype: torch.dtype, dim: int = 64, mode: int = MEAN, weighted: bool = True) -> None:
    weights = torch.ones(N, dtype=dtype) if weighted else None
    grad = torch.ones(3, dim, dtype=dtype)
    TRITON.embedding_bag_backward(grad, *_indices(), weights, mode, 0 if weighted else -1, False, ROWS)


def _weights_backward(dtype: torch.dtype) -> None:
    rows, grad = torch.ones(ROWS, 64, dtype=dtype), torch.ones(3, 64, dtype=dtype)
    TRITON.embedding_bag_weights_backward(grad, rows, *_indices(), MEAN, 0, False)


def _collection(*tables: tuple[torch.dtype, int]) -> None:
    weights = [torch.ones(ROWS, dim, dtype=dtype) for dtype, dim in tables]
    scales = [torch.ones(ROWS, 2, dtype=F16)] * len(tables)
    plan = torch.zeros(len(tables), 6, dtype=torch.int64)
    total, out = sum(dim for _, dim in tables), F64 if tables[0][0] == F64 else F32
    indices, offsets = torch.zeros(N, dtype=torch.int64), torch.zeros(len(tables) * 2 + 1, dtype=torch.int64)
    TRITON.embedding_bag_collection(weights, scales, plan, indices, offsets, None, total, out)


def _int8(
    rows: int, width: int, columns: int, scheme: int, group: int = 0, activation: int = RELU, dtype: torch.dtype = F32
) -> None:
    scale = torch.ones(columns, -(-width // group) if group else 1)
    weight = torch.ones(columns, width, dtype=torch.int8)
    bias = torch.ones(columns)
    TRITON.int8_linear(
        torch.ones(rows, width, dtype=dtype), weight, scale, group, bias, None, scheme, activation, dtype
    )


def _structure(columns: int, width: int, block: tuple[int, int], kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With as many entries, or blocks, in each row; of 2:4 (block 0 x 0) what follows from the sizes."""
    if block == (0, 0):
        return torch.zeros(0, dtype=torch.int32), torch.zeros(columns, -(-width // 8), dtype=torch.uint8)
    strips = -(-columns // block[0])
    return torch.arange(strips + 1, dtype=torch.int32) * kept, torch.arange(kept, dtype=torch.int32).repeat(strips)


def _sparse(
    rows: int, block: tuple[int, int], dtype: torch.dtype = F32, scheme: int = WEIGHT_ONLY, size: int = 1024,
    activation: int = RELU,
) -> None:  # fmt: skip
    """A layer with a tenth of the weights, but for 2:4; with a scheme for int8 values these are int8."""
    crow, col = _structure(size, size, block, max(1, size // (10 * max(1, block[1]))))
    shape = (size, size // 2) if block == (0, 0) else (col.shape[0], *(block if block != (1, 1) else ()))
    integers = scheme != WEIGHT_ONLY
    values = torch.ones(shape, dtype=torch.int8 if integers else dtype)
    layer = (values, crow, col, size, size, torch.ones(size) if integers else None, torch.ones(size), None)
    TRITON.sparse_linear(torch.ones(rows, size, dtype=dtype), *layer, scheme, activation, dtype)


def _sparse_gradient(block: tuple[int, int], dtype: torch.dtype = F32) -> None:
    grad, x = torch.ones(512, 1024), torch.ones(512, 1024, dtype=dtype)
    TRITON.sparse_weight_gradient(grad, x, *_structure(1024, 1024, block, 64), *block, dtype)


def _unraised(mode: str, case: Callable[[], None]) -> None:
    with rk.bounds_check(mode):
        case()


U8 = torch.uint8
CASES: dict[str, Callable[[], None]] = {
    "fp32 64": lambda: _pool(F32, 64),
    "fp32 128": lambda: _pool(F32, 128),
    "fp32 33": lambda: _pool(F32, 33),
    "fp32 64 mean of weighted int32 with padding": lambda: _pool(F32, 64, MEAN, True, 0),
    "fp32 64 max": lambda: _pool(F32, 64, MAX),
    "fp16 64": lambda: _pool(F16, 64),
    "fp16 128 weighted": lambda: _pool(F16, 128, SUM, True),
    "bf16 128": lambda: _pool(BF16, 128),
    "fp64 64": lambda: _pool(F64, 64),
    "int8 64": lambda: _quantized(64, 8),
    "int4 128": lambda: _quantized(128, 4),
    "argmax fp32 64": lambda: _argmax(F32),
    "backward fp32 64": lambda: _backward(F32),
    "backward fp32 128 sum": lambda: _backward(F32, 128, SUM, False),
    "backward bf16 64": lambda: _backward(BF16),
    "weights backward fp32 64": lambda: _weights_backward(F32),
    "collection fp32 64": lambda: _collection((F32, 64)),
    "collection fp32 16, 50, 128": lambda: _collection((F32, 16), (F32, 50), (F32, 128)),
    "collection fp16 64": lambda: _collection((F16, 64)),
    "collection fp64 64": lambda: _collection((F64, 64)),
    "collection int8 or int4 64": lambda: _collection((U8, 64)),
    "collection fp32 64, bf16 128, int8 or int4 64": lambda: _collection((F32, 64), (BF16, 128), (U8, 64)),
    "fp32 64 clamped": lambda: _unraised("clamp", lambda: _pool(F32, 64)),
    "int8 64 ignored": lambda: _unraised("ignore", lambda: _quantized(64, 8)),
    "backward fp32 64 clamped": lambda: _unraised("clamp", lambda: _backward(F32)),
    "layer of 1 x 512 x 512": lambda: _int8(1, 512, 512, DYNAMIC, activation=GELU),
    "layer of 512 x 1024 x 1024": lambda: _int8(512, 1024, 1024, DYNAMIC),
    "layer of 512 x 1024 x 4096, groups of 128": lambda: _int8(512, 1024, 4096, DYNAMIC, 128),
    "weights only, 16 x 1024 x 4096, fp16": lambda: _int8(16, 1024, 4096, WEIGHT_ONLY, dtype=F16),
    "weights only, 512 x 1024 x 4096, bf16": lambda: _int8(512, 1024, 4096, WEIGHT_ONLY, 64, dtype=BF16),
    "sparse, 1 row, fp32": lambda: _sparse(1, (1, 1), activation=GELU),
    "sparse, 1 row, dynamic blocks of 4 x 1": lambda: _sparse(1, (4, 1), scheme=DYNAMIC),
    "sparse, 8 rows, fp16 2:4": lambda: _sparse(8, (0, 0), F16),
    "sparse, 512 rows, fp32": lambda: _sparse(512, (1, 1)),
    "sparse, 512 rows, bf16": lambda: _sparse(512, (1, 1), BF16),
    "sparse, 512 rows, dynamic": lambda: _sparse(512, (1, 1), scheme=DYNAMIC),
    "sparse, 512 rows, blocks of 4 x 1": lambda: _sparse(512, (4, 1)),
    "sparse, 512 rows, blocks of 16 x 1": lambda: _sparse(512, (16, 1)),
    "sparse, 512 rows, blocks of 16 x 4, bf16": lambda: _sparse(512, (16, 4), BF16),
    "sparse, 512 rows, dynamic blocks of 16 x 4": lambda: _sparse(512, (16, 4), scheme=DYNAMIC),
    "sparse, 512 rows, dynamic 2:4": lambda: _sparse(512, (0, 0), scheme=DYNAMIC),
    "sparse gradient, fp32": lambda: _sparse_gradient((1, 1)),
    "sparse gradient, bf16 2:4": lambda: _sparse_gradient((0, 0), BF16),
    "sparse gradient, blocks of 4 x 4": lambda: _sparse_gradient((4, 4)),
    "collection fp32 64 ignored": lambda: _unraised("ignore", lambda: _collection((F32, 64))),
}


def _record(case: Callable[[], None], patch: pytest.MonkeyPatch) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    launches = []

    def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **constants: Any) -> None:
        launches.append((kernel, args, constants))
        if kernel is triton_kernels.keys_kernel:
            flags = args[6]
            flags[2:] = torch.tensor([0, N])  # the range it would have found, or nothing is left to sum

    patch.setattr(operators, "_launch", launch)
    patch.setattr(linear_triton, "launch", launch)
    case()
    return launches


# ---- what was compiled -------------------------------------------------------------------------------------------


def _tool(name: str, *args: str) -> str:
    return subprocess.run([str(_TOOLS / name), *args], check=True, capture_output=True, text=True).stdout


def _nvidia(compiled: Any, folder: Path) -> dict[str, int]:
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", _tool("cuobjdump", "-res-usage", str(cubin)))
    assert usage is not None
    sass = _tool("nvdisasm", "-c", str(cubin))
    return {
        "registers": int(usage[1]),
        "bytes of local memory": int(usage[2]) + int(usage[3]),
        "instructions on local memory": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        # A register that is loaded twice is one that the second load had to wait for.
        "wide loads": len(set(re.findall(r"\bLDG\.E\.128 (R\d+)", sass))),
        "wide copies": len(re.findall(r"\bLDGSTS\.E\.BYPASS\.128\b", sass)),
        "products of bytes": len(re.findall(r"\b(?:IMMA|IGMMA|UTCIMMA)\b", sass)),
        "products of floats": len(re.findall(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", sass)),
    }


def _amd(compiled: Any) -> dict[str, int]:
    code = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", code)[0])

    return {
        "registers": number("vgpr_count"),
        "bytes of local memory": number("private_segment_fixed_size"),
        "instructions on local memory": number("vgpr_spill_count") + number("sgpr_spill_count"),
        "wide loads": len(re.findall(r"\b(?:global|buffer)_load_dwordx4\b", code)),
        "products of bytes": len(re.findall(r"\bv_mfma_i32_", code)),
        "products of floats": len(re.findall(r"\bv_mfma_f32_", code)),
    }


def measure(case: str, name: str, target: _NamedTarget, patch: pytest.MonkeyPatch, folder: Path) -> Any:
    """For each launch of a case the kernel's name and what its compiled code takes."""
    target.name = name
    for kernel, args, constants in _record(CASES[case], patch):
        if name == "gfx942":
            constants.pop("maxnreg", None)
        compiled = kernel.warmup(*args, grid=(1,), **constants)
        found = _amd(compiled) if name == "gfx942" else _nvidia(compiled, folder)
        yield kernel.fn.__name__, found | {"bytes of shared memory": compiled.metadata.shared}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("case", CASES)
def test_budget(case: str, name: str, target: _NamedTarget, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    launched, breaches = set(), []
    for kernel, found in measure(case, name, target, monkeypatch, tmp_path):
        budget = BUDGETS[case][kernel]
        launched.add(kernel)
        most = {
            "registers": budget.registers[TARGETS.index(name)],
            "bytes of local memory": 0,
            "instructions on local memory": 0,
            "bytes of shared memory": budget.shared,
        }
        for what, may in most.items():
            if found[what] > may:
                breaches.append(f"{kernel} on {name}, {case}: {what} was {found[what]}, may be {may}")
        fewest = {"wide loads": budget.wide_loads[name == "gfx942"]}
        if budget.products:
            fewest[budget.products] = 1
        if name != "gfx942":
            fewest["wide copies"] = budget.wide_copies
        for what, must in fewest.items():
            if found[what] < must:
                breaches.append(f"{kernel} on {name}, {case}: {what} were {found[what]}, must be {must} or more")
    assert not breaches, "\n".join(breaches)
    assert launched == set(BUDGETS[case])
