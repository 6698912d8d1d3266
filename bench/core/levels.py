"""Instruction-set levels of the sides: RECSYS_KERNELS_ISA caps the peers, too, as far as they have a switch for it.

Imports nothing that reads these variables, so that `caps` can be set first.
"""

from __future__ import annotations

import os

CAPS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx512": {
        "ATEN_CPU_CAPABILITY": "avx512",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512",
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
}


def cap() -> str:
    """The level that all sides are held to ("avx2" or "avx512"), or "" where everything runs as it comes."""
    level = os.environ.get("RECSYS_KERNELS_ISA", "")
    return level if level in CAPS else ""


def caps() -> dict[str, str]:
    """The peers' own variables for `cap()`. They are read when a library is loaded, or at its first call."""
    return CAPS.get(cap(), {})


def of_sides() -> dict[str, str]:
    """The level that every side runs at in this process, as text."""
    import torch

    from recsys_kernels.backends.registry import native

    def switched(variable: str) -> str:
        value = os.environ.get(variable)
        return f"{variable}={value}" if value else "all that it finds"

    return {
        "recsys_kernels": native.isa() or f"no native library: {native.reason}",
        "torch": f"{torch.backends.cpu.get_cpu_capability()}, {switched('ATEN_CPU_CAPABILITY')}",
        "FBGEMM and torch's engine fbgemm": switched("FBGEMM_ENABLE_INSTRUCTIONS"),
        "oneDNN (torch's engine onednn, torchao, OpenVINO)": switched("ONEDNN_MAX_CPU_ISA"),
        "MKL (torch fp32)": switched("MKL_ENABLE_INSTRUCTIONS") + (", made for Intel's CPUs" if cap() else ""),
        "onnxruntime": f"can't be held to {cap()}, hence left out" if cap() else "all that it finds",
    }
