"""The steps of run.sh: runs each within its share of the time, and writes down what came of it.

Uses the standard library only, so that it can say what is missing on a machine where nothing else works.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
from sanitizer import options as sanitizer_options
from toolkit import program

ROOT = Path(__file__).resolve().parent.parent.parent
HERE = "tests/gpu"
PYTHON = os.environ.get("PYTHON", "").strip() or sys.executable  # the one of run.sh
SECONDS = 480
PASSED, FAILED, TIMED_OUT, NOT_RUN = "passed", "failed", "timed out", "not run"


@dataclass(frozen=True)
class Step:
    """One command. It has `seconds`, and what the steps before it left of theirs.

    "{deadline}" in it becomes the time, of time.monotonic(), at which it will be stopped.

    data: the name under which the last line of its output, a JSON object, is kept.
    """

    name: str
    command: list[str]
    seconds: int
    data: str = ""


def _tests(backend: str, *files: str, workers: int = 0) -> list[str]:
    # Not those of pyproject.toml, which take more than pytest.
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=short", f"--backend={backend}"]
    if workers and importlib.util.find_spec("xdist"):
        options += ["-n", str(workers)]
    return [PYTHON, "-m", "pytest", *options, *(f"{HERE}/device/{name}" for name in files)]


def _sanitizer(tool: str, *arguments: str) -> list[str]:
    return ["compute-sanitizer", *sanitizer_options(tool), PYTHON, f"{HERE}/small_set.py", *arguments]


_SMALL = ("test_operators.py", "test_faults.py", "test_modules.py", "test_int8.py", "test_sparse.py")
_LARGE = ("test_streams.py", "test_large.py", "test_int8_large.py", "test_sparse_large.py")
STEPS = [
    Step("prerequisites", [PYTHON, f"{HERE}/prerequisites.py"], 5),
    Step("build", [PYTHON, "setup.py", "build_ext", "--inplace"], 60),
    Step("machine", [PYTHON, f"{HERE}/machine.py"], 25, data="machine"),
    Step("operators, CUDA C++", _tests("cuda", ""), 70),
    # Compiling takes nearly all of the time, and is work for several cores; the other files need the GPU alone.
    Step("operators, Triton", _tests("triton", *_SMALL, workers=min(8, os.cpu_count() or 1)), 90),
    Step("streams and sizes, Triton", _tests("triton", *_LARGE), 35),
    Step("assumptions", [PYTHON, f"{HERE}/assumptions.py"], 30),
    Step("sanitizer", [PYTHON, f"{HERE}/sanitizer.py", "memcheck", "racecheck", "initcheck"], 20),
    Step("memcheck", _sanitizer("memcheck"), 35),
    # Of shared memory only, which kernels of linear layers have; it has nothing to see in lookups and their gradients.
    Step("racecheck", _sanitizer("racecheck"), 30),
    # What torch's kernels write would count as never written, so only what needs none of them.
    Step("initcheck", _sanitizer("initcheck", "--lookups-only"), 25),
    Step("benchmarks", [PYTHON, f"{HERE}/benchmark.py", "--until", "{deadline}"], 55, data="benchmarks"),
]


@dataclass
class Outcome:
    """What became of a step. `note`: the last line that it printed, or why it did not run."""

    name: str
    result: str
    seconds: float = 0.0
    note: str = ""
    tail: list[str] = field(default_factory=list)


class Run:
    """All steps, one after the other, and their record in a folder."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out = out
        self.scale = seconds / sum(step.seconds for step in STEPS)
        self.begin = time.monotonic()
        self.outcomes: list[Outcome] = []
        self.data: dict[str, Any] = {}
        self.process: subprocess.Popen[bytes] | None = None
        out.mkdir(parents=True, exist_ok=True)

    def steps(self) -> None:
        """Runs every step and writes the record anew after each, in case that this program is killed."""
        granted = 0.0
        with (self.out / "log.txt").open("wb") as log:
            for step in STEPS:
                granted += step.seconds * self.scale
                left = self.begin + granted - time.monotonic()
                print(f"==== {step.name} (at most {left:.0f} s)", flush=True)
                outcome = self.step(step, left, log)
                self.outcomes.append(outcome)
                if outcome.result != PASSED:
                    print("\n".join(outcome.tail[-40:]))
                print(f"---- {step.name}: {outcome.result}, {outcome.seconds:.1f} s. {outcome.note}", flush=True)
                self.write()

    def step(self, step: Step, limit: float, log: IO[bytes]) -> Outcome:
        """Runs one step; its output goes to the log."""
        found = program(step.command[0])
        if found is None:
            return Outcome(step.name, NOT_RUN, note=f"{step.command[0]} is neither on the PATH nor in a CUDA toolkit")
        log.write(f"==== {step.name}: {' '.join(step.command)}\n".encode())
        log.flush()
        start, position = time.monotonic(), log.tell()
        command = [found, *(word.format(deadline=f"{start + limit:.1f}") for word in step.command[1:])]
        # A group of its own: what the step has started must end with it.
        self.process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, "PYTHONUNBUFFERED": "1"}, stdin=subprocess.DEVNULL, stdout=log,
            stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            code = self.process.wait(max(0.1, limit))
            result, note = (PASSED, "") if code == 0 else (FAILED, f"exit status {code}")
        except subprocess.TimeoutExpired:
            result, note = TIMED_OUT, f"stopped after {limit:.0f} s"
        finally:
            self.stop()
        printed = (self.out / "log.txt").read_bytes()[position:].decode(errors="replace").splitlines()
        lines = [line for line in printed if line.strip()]
        if step.data:
            self.keep(step.data, lines)
        last = "" if not lines or lines[-1].startswith("{") else lines[-1].strip("= ")
        return Outcome(step.name, result, time.monotonic() - start, "; ".join(filter(None, (note, last))), lines[-60:])

    def keep(self, name: str, lines: list[str]) -> None:
        """Keeps the last JSON object that a step printed, even of one that failed afterwards."""
        for line in reversed(lines):
            if line.startswith("{"):
                try:
                    self.data[name] = json.loads(line)
                except ValueError:
                    continue
                return

    def stop(self) -> None:
        """Ends what the present step has started and not ended itself."""
        if self.process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
                self.process.wait(3)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        self.process = None

    @property
    def bad(self) -> list[Outcome]:
        """Steps that did not pass."""
        return [outcome for outcome in self.outcomes if outcome.result != PASSED]

    def write(self) -> None:
        """Writes run.json and run.md."""
        record = {"steps": [asdict(outcome) for outcome in self.outcomes], **self.data}
        (self.out / "run.json").write_text(json.dumps(record, indent=1) + "\n")
        (self.out / "run.md").write_text(markdown(self.outcomes, self.data))


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    lines = [header, tuple("---" for _ in header), *rows]
    return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]


def markdown(outcomes: list[Outcome], data: dict[str, Any]) -> str:
    """The record for people."""
    machine = data.get("machine", {})
    lines = [f"# {machine.get('gpu', 'no GPU known')}, commit {machine.get('commit', 'not known')}", ""]
    facts = [(name, str(value)) for name, value in machine.items() if name not in ("gpu", "commit")]
    lines += [*_table(("machine", ""), facts), ""] if facts else []
    steps = [(o.name, o.result, f"{o.seconds:.1f} s", o.note) for o in outcomes]
    lines += [*_table(("step", "result", "time", "note"), steps), ""]
    measured = data.get("benchmarks")
    if measured:
        lines += _benchmarks(measured)
    return "\n".join(lines) + "\n"


def _benchmarks(measured: dict[str, Any]) -> list[str]:
    rows = []
    for case in measured["cases"]:
        sides = case["sides"]
        for side in sorted(sides):
            found = sides[side]
            if "seconds" not in found:
                rows.append((case["name"], side, found["absent"], "", "", ""))
                continue
            rate = found["bytes_per_second"]
            rows.append(
                (
                    case["name"],
                    side,
                    f"{found['seconds'] * 1e6:.1f} us",
                    f"{rate / 1e9:.0f} GB/s",
                    f"{rate / measured['copy_bytes_per_second']:.0%}",
                    f"{found['ratio']:.2f} [{found['low']:.2f}-{found['high']:.2f}]" if "ratio" in found else "",
                )
            )
    copy = f"A copy of {measured['copy_bytes'] / 1e9:.1f} GB ran at {measured['copy_bytes_per_second'] / 1e9:.0f} GB/s,"
    return [
        f"{copy} bytes read and written.",
        "",
        *_table(("case", "side", "a call", "rows, indices and output", "of the copy", "its time over ours"), rows),
        *(f"\n{name} was not measured: {reason}" for name, reason in measured["failed"].items()),
        *(f"\n{name} was left out: no time was left" for name in measured["left_out"]),
        "",
    ]


def main() -> int:
    """Returns 0 if every step passed."""
    parser = argparse.ArgumentParser(prog="run.sh", description="Checks and measures on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu", metavar="FOLDER")
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="N", help="for all steps together")
    options = parser.parse_args()
    run = Run(options.out.resolve(), options.seconds)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        run.steps()
    except KeyboardInterrupt:
        run.stop()
        run.write()
        print("interrupted")
        return 130
    print(f"\n{run.out / 'run.md'}\n{run.out / 'run.json'}\n{run.out / 'log.txt'}")
    if not run.bad:
        print(f"all {len(STEPS)} steps passed")
        return 0
    print(f"{len(run.bad)} of {len(STEPS)} steps did not pass:")
    for outcome in run.bad:
        print(f"  {outcome.name}: {outcome.result}. {outcome.note}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
