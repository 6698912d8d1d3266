"""The ``doctor``: lists the abilities of this machine and the backend of each operator."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from pathlib import Path
from typing import Any

import torch

from . import selection
from .registry import Facts, families, native


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


def doctor() -> dict[str, Any]:
    """Prints what this machine has and what each operator will run on, and why something is missing.

    Returns:
        The same as a dict: ``versions`` (package to version or None), ``machine``, ``backends`` (name to None when it
        can run, else the reason), ``isa`` (``in_use``, ``supported``), ``cuda`` (``release`` and ``architectures`` that
        the CUDA C++ kernels are built with and for, or None), ``library``, ``threads``, and ``operators`` (operator
        to the backend for ``"cpu"`` tensors and, where torch sees a GPU, ``"cuda"`` tensors). The families of operators
        add ``huge_pages``, ``through_torch`` (options that torch's own operator serves) and ``sparse_runs_dense``: by
        the type of its weights and the output rows that share their columns, the share of zeros below which a sparse
        layer runs as a dense one on the CPU, with up to 8 rows of input and with more (0.0: never). For int8 products
        this is the share of fours of columns that are all zero, as four columns are multiplied together.
    """
    from .. import __version__  # the module exists once the package has been imported

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
        "backends": {name: selection.why_not(name) for name in selection.BACKENDS},
        "isa": {"in_use": native.isa(), "supported": native.isa_supported()},
        "cuda": release and {"release": "{}.{}".format(*release), "architectures": native.cuda_architectures()},
        "library": str(native.path) if native.path else None,
        "threads": torch.get_num_threads(),
        "operators": {
            name: {
                device: "/".join(dict.fromkeys(selection.chosen(part, device) for part in parts))
                for device in (("cpu", "cuda") if torch.cuda.is_available() else ("cpu",))
            }
            for family in families()
            for name, parts in family.shown.items()
        },
    }
    told: list[Facts] = [family.resolve(family.facts)() for family in families() if family.facts is not None]
    for part in told:
        facts.update(part.values)
    print(_text(facts, told))
    return facts


def _text(facts: dict[str, Any], told: list[Facts]) -> str:
    versions = ", ".join(f"{name} {version or 'not there'}" for name, version in facts["versions"].items())
    isa = facts["isa"]
    level = f"{isa['in_use']} (this machine and build support {isa['supported']})" if isa["in_use"] else "none"
    cuda = "not in the library"
    if facts["cuda"]:
        targets = " ".join(f"sm_{number}" for number in facts["cuda"]["architectures"])
        cuda = f"built with {facts['cuda']['release']} for {targets}"
    lines = [
        f"versions    {versions}",
        f"machine     {facts['machine']['cpu']} ({facts['machine']['architecture']}), {facts['threads']} threads",
        f"GPUs        {', '.join(facts['machine']['gpus']) or 'none that torch sees'}",
        f"ISA level   {level}",
        f"library     {facts['library'] or native.reason}",
        f"CUDA C++    {cuda}",
        *(f"{label:<12}{text}" for part in told for label, text in part.heading),
        "",
        "backend     state",
        *(f"{name:<11} {reason or 'ready'}" for name, reason in facts["backends"].items()),
        "",
        f"{'operator':<26}{'on CPU tensors':<18}on CUDA tensors",
        *(f"{name:<26}{on['cpu']:<18}{on.get('cuda', 'no GPU')}" for name, on in facts["operators"].items()),
        *(line for part in told for line in part.notes),
    ]
    return "\n".join(lines)
