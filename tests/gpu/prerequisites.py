"""Says what this machine lacks for the steps of run.sh: nothing here downloads anything, so it has to be there before.

Uses the standard library only.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from toolkit import program  # noqa: E402

# What each is for; without those of the first list most steps fail, without those of the second only some.
PACKAGES = {
    "torch": "everything, 2.10 or newer, for CUDA",
    "numpy": "the tests",
    "setuptools": "the build",
    "ninja": "the build",
    "pytest": "the tests",
}
MORE_PACKAGES = {"triton": "the Triton kernels", "xdist": "compiling Triton's kernels on several cores (pytest-xdist)"}
PROGRAMS = {"nvcc": "the build of the CUDA kernels", "g++": "the build; Triton compiles with it, too"}
MORE_PROGRAMS = {"compute-sanitizer": "memcheck, racecheck and initcheck"}


def missing(packages: dict[str, str], programs: dict[str, str]) -> list[str]:
    """A line for each that is not there."""
    lacks = {name: use for name, use in packages.items() if importlib.util.find_spec(name) is None}
    if shutil.which("ninja"):
        lacks.pop("ninja", None)
    lacks |= {name: use for name, use in programs.items() if program(name) is None}
    return [f"{name} is missing, which is for {use}" for name, use in lacks.items()]


def main() -> int:
    """Returns 1 if something is missing."""
    needed = missing(PACKAGES, PROGRAMS)
    useful = missing(MORE_PACKAGES, MORE_PROGRAMS)
    for line in needed + useful:
        print(line)
    if not needed + useful:
        print("nothing is missing")
    return 1 if needed else 0


if __name__ == "__main__":
    sys.exit(main())
