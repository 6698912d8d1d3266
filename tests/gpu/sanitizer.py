"""Whether compute-sanitizer finds what it is there for: a kernel for each tool that is wrong on purpose.

`sanitizer.py memcheck racecheck initcheck` runs sanitized.cu under each, with the options of the steps of run.sh.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
from toolkit import program  # noqa: E402

FOUND = 9  # the exit status of a tool that found something


def options(tool: str) -> list[str]:
    """Our kernels only, by their namespace: torch's are not ours to judge, and each tool slows down what it watches."""
    return ["--tool", tool, "--kernel-name", "kns=_ZN2rk", "--report-api-errors", "no", "--error-exitcode", str(FOUND)]


def main(tools: list[str]) -> int:
    """Returns 0 if each tool found its own kernel."""
    from assumptions import compile_program

    sanitizer = program("compute-sanitizer")
    if sanitizer is None:
        print("compute-sanitizer was not found")
        return 1
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "sanitized"
        reason = compile_program(target, "-arch=native", source="sanitized.cu")
        if reason is not None:
            print(reason)
            return 1
        for tool in tools:
            code = subprocess.run([sanitizer, *options(tool), str(target), tool]).returncode
            print(f"{tool} ended with {code} where a kernel is wrong, and must with {FOUND}", flush=True)
            missed += [tool] if code != FOUND else []
    print(f"found nothing: {', '.join(missed)}" if missed else "each tool finds its kernel")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
