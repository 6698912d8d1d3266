"""Prints what a run's figures belong to, as one line of JSON; fails unless both GPU backends can run."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import recsys_kernels as rk  # noqa: E402
from recsys_kernels.backends.registry import driver_release  # noqa: E402


def _said(*command: str) -> str:
    if shutil.which(command[0]) is None:
        return ""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def _commit() -> str:
    commit = _said("git", "rev-parse", "--short=10", "HEAD") or "not known"
    return f"{commit} with changes" if _said("git", "status", "--porcelain", "--untracked-files=no") else commit


def main() -> int:
    """Returns 1 if a backend that this run is about cannot run."""
    facts = rk.doctor()
    release = re.search(r"release ([\d.]+)", _said("nvcc", "--version"))
    driver = driver_release()
    record = {
        "gpu": ", ".join(facts["machine"]["gpus"]) or "none",
        "commit": _commit(),
        "driver": "none"
        if driver is None
        else f"{_said('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')}"
        f" (CUDA {driver[0]}.{driver[1]})",
        "torch": torch.__version__,
        "triton": str(facts["versions"]["triton"]),
        "python": platform.python_version(),
        "nvcc": release[1] if release else "not on the PATH",
        "kernels": "not built" if facts["cuda"] is None else f"CUDA {facts['cuda']['release']}",
        "CUDA tensors get": ", ".join(
            f"{name}: {on.get('cuda', 'nothing')}" for name, on in facts["operators"].items()
        ),
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record["memory"] = f"{properties.total_memory / 2**30:.0f} GiB"
        record["multiprocessors"] = properties.multi_processor_count
    print(json.dumps(record))
    missing = {name: facts["backends"][name] for name in ("cuda", "triton") if facts["backends"][name]}
    for name, reason in missing.items():
        print(f"backend {name} cannot run: {reason}")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
