"""What the figures of a report depend on: processor, memory, versions."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from recsys_kernels import __version__
from recsys_kernels.backends.registry import native
from recsys_kernels.backends.selection import chosen

ROOT = Path(__file__).resolve().parent.parent.parent
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def _read(path: str | Path) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else "unknown"


def _command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@functools.cache
def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [_read(folder / "size") for folder in CACHES.glob("index*")]
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=32 << 20)


def facts(packages: Iterable[str]) -> dict[str, str]:
    """The facts as text; `packages`: whose versions matter, besides torch's and numpy's."""
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    caches = (f"L{_read(c / 'level')} {_read(c / 'type')} {_read(c / 'size')}" for c in sorted(CACHES.glob("index*")))
    versions = dict.fromkeys(("torch", "numpy", *packages))
    dirty = " (with changes)" if _command("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "CPU": f"{model[1] if model else platform.processor()}, {len(os.sched_getaffinity(0))} CPUs",
        "Caches": ", ".join(caches),
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "Transparent huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "recsys_kernels": f"{__version__}, backend {chosen('embedding_bag', 'cpu')}, {native.isa() or native.reason}",
        "Versions": ", ".join(f"{package} {_version(package)}" for package in versions),
        "Commit": (_command("git", "rev-parse", "--short=12", "HEAD") or "unknown") + dirty,
        "Load average at the start": f"{os.getloadavg()[0]:.1f}",
        "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
