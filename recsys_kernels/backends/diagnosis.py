"""What this machine has, and what each operator will run on."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..ops.linear.sparse.autograd import FEW_ROWS
from ..ops.linear.sparse.crossover import CROSSOVER
from . import memory
from . import selection as _backends
from .native import native

# For a person one row a user-facing operator; its parts (backward and so on) run on the same backend.
_OPERATORS = {
    "embedding_bag": ("embedding_bag", "embedding_bag_backward"),
    "quantized_embedding_bag": ("quantized_embedding_bag",),
    "embedding_bag_collection": ("embedding_bag_collection",),
    "quantize_rowwise": ("quantize_rowwise",),
    "int8_linear": ("int8_linear",),
    "sparse_linear": ("sparse_linear", "sparse_weight_gradient"),
}
_THROUGH_TORCH = "max_norm, scale_grad_by_freq"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _huge_pages() -> str:
    """Whether tables can be on 2 MiB pages: tried, not only read from the system's setting."""
    state = memory.huge_pages_state()
    granted = memory.use_huge_pages(torch.zeros(6 << 20, dtype=torch.uint8))
    collapse = "existing tables can be moved" if granted else "existing tables stay on 4 KiB pages"
    if state in ("always", "madvise"):
        return f"{state}: new tables are on 2 MiB pages, {collapse}"
    return f"{state}: tables stay on 4 KiB pages, lookups in large ones are slower"


def _sparse_runs_dense() -> dict[str, dict[str, tuple[float, float]]]:
    """The sparsity below which a layer is faster as a dense one on the CPU."""
    level = native.isa()
    kinds = {} if level is None else CROSSOVER[level]
    return {
        kind: {
            f"{group} row{'s' * (group > 1)}": (round(1 - few, 3), round(1 - many, 3))
            for group, (few, many) in limits.items()
        }
        for kind, limits in kinds.items()
    }


def doctor() -> dict[str, Any]:
    """Prints what this machine has and what each operator will run on, and why something is missing.

    Returns:
        The same as a dict: ``versions`` (package to version or None), ``machine``, ``backends`` (name to None when it
        can run, else the reason), ``isa`` (``in_use``, ``supported``), ``cuda`` (``release`` and ``architectures`` that
        the CUDA C++ kernels are built with and for, or None), ``huge_pages``, ``threads``, and ``operators`` (operator
        to the backend for ``"cpu"`` tensors and, where torch sees a GPU, ``"cuda"`` tensors). ``sparse_runs_dense``: by
        the type of its weights and the output rows that share their columns, the share of zeros below which a sparse
        layer runs as a dense one on the CPU, with up to 8 rows of input and with more (0.0: never). Of int8 products
        that of all-zero fours of columns, which are multiplied together.
    """
    release = native.cuda_release()
    facts: dict[str, Any] = {
        "versions": {
            "recsys_kernels": __version__,
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "machine": {
            "cpu": _cpu_name(),
            "architecture": platform.machine(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
        "backends": {name: _backends.why_not(name) for name in _backends.BACKENDS},
        "isa": {"in_use": native.isa(), "supported": native.isa_supported()},
        "cuda": release and {"release": "{}.{}".format(*release), "architectures": native.cuda_architectures()},
        "library": str(native.path) if native.path else None,
        "huge_pages": _huge_pages(),
        "threads": torch.get_num_threads(),
        "operators": {
            name: {
                device: "/".join(dict.fromkeys(_backends.chosen(part, device) for part in parts))
                for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
            }
            for name, parts in _OPERATORS.items()
        },
        "through_torch": _THROUGH_TORCH,
        "sparse_runs_dense": _sparse_runs_dense(),
    }
    print(_text(facts))
    return facts


_DENSE = (
    f"{'':<26}run dense where fewer of their weights are zero (int8: of their fours of columns),",
    f"{'':<26}with up to {FEW_ROWS} rows of input and with more; output rows that share their columns:",
)


def _share(zeros: float) -> str:
    return f"{zeros:.0%}" if zeros else "never"


def _text(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version or 'not there'}" for name, version in facts["versions"].items())
    isa = facts["isa"]
    level = f"{isa['in_use']} (this machine and build support {isa['supported']})" if isa["in_use"] else "none"
    cuda = "not in the library"
    if facts["cuda"]:
        targets = " ".join(f"sm_{number}" for number in facts["cuda"]["architectures"])
        cuda = f"built with {facts['cuda']['release']} for {targets}"
    dense = [
        f"{'' if number else 'sparse layers':<26}{kind:<18}"
        + ", ".join(f"{group}: {_share(few)} and {_share(many)}" for group, (few, many) in limits.items())
        for number, (kind, limits) in enumerate(facts["sparse_runs_dense"].items())
    ]
    lines = [
        f"versions    {versions}",
        f"machine     {facts['machine']['cpu']} ({facts['machine']['architecture']}), {facts['threads']} threads",
        f"GPUs        {', '.join(facts['machine']['gpus']) or 'none that torch sees'}",
        f"ISA level   {level}",
        f"library     {facts['library'] or native.reason}",
        f"CUDA C++    {cuda}",
        f"huge pages  {facts['huge_pages']}",
        "",
        "backend     state",
        *(f"{name:<11} {reason or 'ready'}" for name, reason in facts["backends"].items()),
        "",
        f"{'operator':<26}{'on CPU tensors':<18}on CUDA tensors",
        *(f"{name:<26}{on['cpu']:<18}{on.get('cuda', 'no GPU')}" for name, on in facts["operators"].items()),
        f"{'':<26}{facts['through_torch']}: always torch's own operator",
        *(["", *_DENSE, *dense] if dense else []),
    ]
    return "\n".join(lines)
