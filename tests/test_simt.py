"""Runs the tests of emulated CUDA kernels once more, with AddressSanitizer and UBSan, in a process of their own.

The sanitizers' runtime has to be there when the process starts. ``pytest tests/simt`` runs the same tests with the
checks that need no such thing.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from simt.support import require, sanitizer_environment


@pytest.fixture(autouse=True, scope="module")
def _emulation_is_there() -> None:
    require()


HERE = Path(__file__).parent

_PYTEST = """
import sys
import torch
assert torch.empty(4).isnan().all() and torch.empty(4, dtype=torch.float16).isnan().all(), "memory is not poisoned"
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def sanitized(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = sanitizer_environment()
    return subprocess.run(command, cwd=HERE, env=environment, capture_output=True, text=True, timeout=900)


def test_kernels_under_address_and_undefined_behaviour_sanitizer() -> None:
    # Left out: what takes long and shows nothing new in memory.
    options = ("-q", "-s", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", "-k", "not rows_in_parts")
    done = sanitized(_PYTEST, *options, HERE / "simt")
    output = f"{done.stdout[-4000:]}\n{done.stderr[:4000]}"  # the sanitizer says first what is wrong
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 80, output
    assert " skipped" not in done.stdout, output
    assert "runtime error" not in output


def test_sanitizer_stops_a_kernel_that_reads_too_far() -> None:
    """A table that says it has one row more than its memory: the emulated kernel is stopped at the last one."""
    script = """
import ctypes, sys, torch
sys.path.insert(0, ".")
from simt.support import emulation
operator = emulation().operator("embedding_bag")
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = libc.malloc(ctypes.c_size_t(3 * 20 * 4))
table = torch.frombuffer((ctypes.c_float * (4 * 20)).from_address(memory), dtype=torch.float32).reshape(4, 20)
operator(table, torch.tensor([[2, 0]]), None, None, 0, -1, False)
print("so far all is well", flush=True)
operator(table, torch.tensor([[2, 3]]), None, None, 0, -1, False)
"""
    done = sanitized(script)
    assert done.stdout.strip() == "so far all is well", done.stderr[:3000]
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
    assert re.search(r"csrc/[\w/]+/\w+\.cuh:\d+", done.stderr + located(done.stderr)), done.stderr[:3000]


def located(report: str) -> str:
    """Lines of the source for the addresses in a report: g++ 12's sanitizer names none where a library has several."""
    frames = re.findall(r"\((\S+kernels\.so)\+(0x[0-9a-f]+)\)", report)
    command = ["addr2line", "-i", "-e", frames[0][0], *(address for _, address in frames)] if frames else ["true"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
