"""Compiles assumptions.cu for this machine's GPU and runs it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from cuda_support import ROOT, build_script  # noqa: E402


def compile_program(target: Path, *options: str, source: str = "assumptions.cu") -> str | None:
    """Compiles a program of this folder; returns why it could not be done, or None."""
    script = build_script()
    toolkit = script.cuda_toolkit()
    if toolkit is None:
        return "no CUDA toolkit with nvcc was found"
    flags = [flag for flag in script.nvcc_flags(toolkit.architectures) if not flag.startswith("-gencode")]
    libraries = [f"-L{toolkit.runtime}", "-cudart=static"]
    command = [str(toolkit.nvcc), *flags, *options, f"-I{ROOT / 'csrc'}", *libraries, str(HERE / source)]
    done = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    return done.stdout + done.stderr if done.returncode else None


def main() -> int:
    """Returns 0 if everything holds."""
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "assumptions"
        reason = compile_program(program, "-arch=native")
        if reason is not None:
            print(reason)
            return 1
        return subprocess.run([str(program)]).returncode


if __name__ == "__main__":
    sys.exit(main())
