"""Reads what nvcc made of the kernels: registers, local and shared memory, instructions. No GPU is needed."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest


@functools.cache
def tool(name: str) -> str:
    """cuobjdump or nvdisasm: Triton's package has both, CUDA toolkits made of pip's packages have neither."""
    try:
        import triton
    except ImportError:
        shipped = Path("nowhere")
    else:
        shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = shutil.which(name) or (str(shipped) if shipped.exists() else None)
    if found is None:
        pytest.fail(f"{name} was not found: neither on the PATH nor in an installed triton")
    return found


def _said(*command: str | Path, **options: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"
    return str(done.stdout)


class Kernel(NamedTuple):
    """A compiled kernel. Bytes of local memory are its stack, too: what did not fit into registers."""

    registers: int
    local: int
    shared: int
    sass: str

    def count(self, pattern: str) -> int:
        """Instructions whose text a pattern is found in, each destination once.

        A register that is loaded twice is one that the second load had to wait for.
        """
        return len(set(re.findall(pattern, self.sass)))

    def runs(self, bits: int) -> list[int]:
        """How many loads of so many bits are under way when the first instruction reads one of them, longest first.

        By the order of the code: what comes first in a loop does not count for the one before it.
        """
        found, under_way, loads = [], set[int](), 0
        for line in re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", self.sass):
            registers = [int(number) for number in re.findall(r"\bR(\d+)\b", line)]
            load = re.search(rf"\bLDG\.E\.{bits}(?:\.\w+)* R(\d+)\b", line)
            if under_way.intersection(registers):  # a load into one waits, too
                found.append(loads)
                under_way, loads = set(), 0
            if load is not None:
                under_way.update(range(int(load[1]), int(load[1]) + bits // 32))
                loads += 1
        return sorted([*found, loads] if loads else found, reverse=True)


def _without_parameters(name: str) -> str:
    """A demangled name without its parameters: "pool<float, true>" of "void rk::pool<float, true>(rk::Bags, int)"."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "").replace("rk::", "")
    depth = 0
    for at, character in enumerate(name):
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:at]
    return name


def _demangled(names: Iterable[str]) -> dict[str, str]:
    mangled = list(names)
    lines = _said("c++filt", input="\n".join(mangled)).splitlines()
    return {name: _without_parameters(line) for name, line in zip(mangled, lines, strict=True)}


def kernels_in(cubin: Path) -> dict[str, Kernel]:
    """The kernels in a file of machine code, by demangled name."""
    usage = re.findall(
        r"Function (\S+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        _said(tool("cuobjdump"), "-res-usage", cubin),
    )
    # Every section of code begins with its name; the text before the first one holds none.
    parts = re.split(r"\.section\s+\.text\.(\S+?),", _said(tool("nvdisasm"), "-c", cubin))
    code = dict(zip(parts[1::2], parts[2::2], strict=True))
    names = _demangled(name for name, *_ in usage)
    return {
        names[name]: Kernel(int(registers), int(stack) + int(local), int(shared), code[name])
        for name, registers, stack, shared, local in usage
        if name in code
    }


def kernels_of(library: Path, architecture: str, folder: Path) -> dict[str, Kernel]:
    """The kernels that a library holds for an architecture ("sm_90"); its files of code are left in a folder."""
    _said(tool("cuobjdump"), "-xelf", f".{architecture}.", library.resolve(), cwd=folder)
    found: dict[str, Kernel] = {}
    for cubin in sorted(folder.glob(f"*.{architecture}.cubin")):
        found |= kernels_in(cubin)
    return found


class Budget(NamedTuple):
    """What a kernel may take at most, and must do at least.

    Attributes:
        registers: a thread's, by architecture.
        shared: bytes of shared memory a block.
        wide_loads: 16-byte loads into registers of their own.
        runs: by the bits of a load, for each loop how many must be under way before the first is used.
        local: by architecture, where there may be any: bytes of local memory and instructions on it.
        needs: fewest instructions of a name, for what a kernel is there for.
    """

    registers: Mapping[str, int]
    shared: int
    wide_loads: int
    runs: Mapping[int, tuple[int, ...]] = {}
    local: Mapping[str, tuple[int, int]] = {}
    needs: Mapping[str, int] = {}


class Breach(NamedTuple):
    """What a kernel takes and must not."""

    kernel: str
    architecture: str
    what: str
    was: int
    may: str
    why: str


def breaches(found: Mapping[str, Kernel], budgets: Mapping[str, Budget], architecture: str) -> list[Breach]:
    """What is wrong with the kernels of an architecture, and which of the two lists lacks one."""
    wrong = []

    def check(kernel: str, what: str, was: int, most: int | None, least: int, why: str) -> None:
        if (most is not None and was > most) or was < least:
            may = f"{least} or more" if most is None else f"{most}"
            wrong.append(Breach(kernel, architecture, what, was, may, why))

    for name, kernel in sorted(found.items()):
        budget = budgets.get(name)
        if budget is None:
            wrong.append(Breach(name, architecture, "in the table", 0, "1", "every kernel needs a budget"))
            continue
        check(name, "registers", kernel.registers, budget.registers[architecture], 0, "fewer warps fit")
        local, most_spills = budget.local.get(architecture, (0, 0))
        check(name, "bytes of local memory", kernel.local, local, 0, "spills cost more traffic than rows")
        spills = len(re.findall(r"\b(?:LDL|STL)\b", kernel.sass))
        check(name, "instructions on local memory", spills, most_spills, 0, "spills cost more traffic than rows")
        check(name, "bytes of shared memory", kernel.shared, budget.shared, 0, "fewer blocks fit")
        wide = kernel.count(r"\bLDG\.E\.128(?:\.\w+)* (R\d+)")
        check(name, "wide loads", wide, None, budget.wide_loads, "fewer bytes of rows are in flight")
        for instruction, least in budget.needs.items():
            there = len(re.findall(rf"\b{instruction}\b", kernel.sass))
            check(name, instruction, there, None, least, "the work is done by slower instructions")
        for bits, wanted in budget.runs.items():
            found_runs = kernel.runs(bits) + [0] * len(wanted)
            for place, (was, least) in enumerate(zip(found_runs, sorted(wanted, reverse=True), strict=False)):
                what = f"{bits}-bit loads under way in loop {place + 1} of {len(wanted)}"
                check(name, what, was, None, least, "rows are waited for one after the other")
    for name in sorted(budgets.keys() - found.keys()):
        wrong.append(Breach(name, architecture, "in the library", 0, "1", "the table names a kernel that is not there"))
    return wrong


def as_table(found: Iterable[Breach]) -> str:
    """Breaches as a table for people."""
    rows = [("kernel", "architecture", "what", "was", "may", "why"), *(tuple(map(str, one)) for one in found)]
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
