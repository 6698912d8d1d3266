"""Runs the tests of the Triton kernels under Triton's interpreter, on the CPU, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent


def test_interpreter() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_KERNELS_")}
    environment["TRITON_INTERPRET"] = "1"
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(HERE / "triton_interpreter")]
    result = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=900)
    output = result.stdout[-20000:] + result.stderr[-5000:]
    assert result.returncode == 0, f"exit status {result.returncode}\n{output}"
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 100, output
    assert " skipped" not in result.stdout, output
    print(f"{passed[1]} passed under Triton's interpreter")
