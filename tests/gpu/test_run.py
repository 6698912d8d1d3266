"""The control flow of run.sh without a GPU: its steps are faked, or run on the CPU."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.backends import selection

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="for Linux")


def load(name: str) -> ModuleType:
    """A file of this folder that is a program."""
    spec = importlib.util.spec_from_file_location(f"gpu_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


# ---- the steps, faked ----------------------------------------------------------------------------------------------

MACHINE = {"gpu": "Fake GPU", "commit": "0123456789", "torch": "2.11.0+cu130", "triton": "3.6.0"}
BENCHMARKS = {
    "copy_bytes": 1 << 31,
    "copy_bytes_per_second": 3e12,
    "cases": [
        {
            "name": "fp16-d64-b65536-l20-uniform",
            "sides": {
                "recsys_kernels, CUDA C++": {"seconds": 7e-5, "bytes_per_second": 2.7e12, "rounds": 9},
                "torch": {
                    "seconds": 2.1e-4, "bytes_per_second": 9e11, "rounds": 9, "ratio": 3.0, "low": 2.9, "high": 3.1,
                },
                "fbgemm_gpu": {"absent": "ModuleNotFoundError: No module named 'fbgemm_gpu'"},
            },
        }
    ],
    "failed": {"int8-d64-b1-l50-uniform": "out of memory"},
    "left_out": ["int4-d64-b1-l50-uniform"],
}  # fmt: skip
STEPS = [
    *("prerequisites", "build", "machine", "operators, CUDA C++", "operators, Triton", "streams and sizes, Triton"),
    *("assumptions", "sanitizer", "memcheck", "racecheck", "initcheck", "benchmarks"),
]


class Fake:
    """A folder for the PATH with a python3 and a compute-sanitizer that do as they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out, self.toolkit = folder / "bin", folder / "out", folder / "toolkit"
        self.folder.mkdir()
        self.does: dict[str, str] = {
            "prerequisites.py": "echo nothing is missing",
            "setup.py": "echo built",
            "machine.py": f"echo '{json.dumps(MACHINE)}'",
            "backend=cuda": "echo '== 900 passed in 9.00s =='",
            "test_streams.py": "echo '== 20 passed in 2.00s =='",
            "backend=triton": "echo '== 800 passed in 8.00s =='",
            "assumptions.py": "echo 'all: holds'",
            "sanitizer.py": "echo each tool finds its kernel",
            "tool memcheck": "echo '========= ERROR SUMMARY: 0 errors'",
            "tool racecheck": "echo '========= RACECHECK SUMMARY: 0 hazards'",
            "tool initcheck": "echo '========= ERROR SUMMARY: 0 errors'",
            "benchmark.py": f'cat {folder}/benchmarks.json; test -n "$3"',
        }
        (folder / "benchmarks.json").write_text(f"warming up\n{json.dumps(BENCHMARKS)}\n")

    def run(self, *arguments: str, without: str = "") -> subprocess.CompletedProcess[str]:
        """run.sh on the faked machine."""
        with self.start(*arguments, without=without) as process:
            output, _ = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, output, "")

    def start(self, *arguments: str, without: str = "") -> subprocess.Popen[str]:
        cases = "".join(f'  *"{words}"*) {does};;\n' for words, does in self.does.items())
        lines = f'case "$*" in\n  tests/gpu/run.py*) exec {sys.executable} "$@";;\n{cases}'
        lines += '  *) echo "not faked: $*"; exit 99;;\nesac\n'
        for name in {"python3", "compute-sanitizer"} - {without}:
            (self.folder / name).write_text(f"#!/bin/bash\n{lines}")
            (self.folder / name).chmod(0o755)
        for name in ("bash", "dirname", "echo", "cat", "sleep", "env"):
            target = Path("/bin") / name
            if not (self.folder / name).exists():
                (self.folder / name).symlink_to(target if target.exists() else Path("/usr/bin") / name)
        command = ["/bin/bash", str(HERE / "run.sh"), "--out", str(self.out), *arguments]
        environment = {"PATH": str(self.folder), "HOME": "/nowhere"}
        environment |= {"PYTHON": str(self.folder / "python3"), "CUDA_HOME": str(self.toolkit)}
        return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def outcomes(self) -> dict[str, dict[str, Any]]:
        record = json.loads((self.out / "run.json").read_text())
        assert [step["name"] for step in record["steps"]] == STEPS
        return {step["name"]: step for step in record["steps"]}


@pytest.fixture
def fake(tmp_path: Path) -> Fake:
    return Fake(tmp_path)


def test_everything_passes(fake: Fake) -> None:
    done = fake.run()
    assert done.returncode == 0, done.stdout
    assert "all 12 steps passed" in done.stdout
    outcomes = fake.outcomes()
    assert {step["result"] for step in outcomes.values()} == {"passed"}
    assert outcomes["operators, Triton"]["note"] == "800 passed in 8.00s"
    record = json.loads((fake.out / "run.json").read_text())
    assert record["machine"] == MACHINE
    assert record["benchmarks"] == BENCHMARKS
    page = (fake.out / "run.md").read_text()
    for line in (
        "# Fake GPU, commit 0123456789",
        "| torch | 2.11.0+cu130 |",
        "| memcheck | passed | 0.0 s | ERROR SUMMARY: 0 errors |",
        "A copy of 2.1 GB ran at 3000 GB/s, bytes read and written.",
        "| fp16-d64-b65536-l20-uniform | recsys_kernels, CUDA C++ | 70.0 us | 2700 GB/s | 90% |  |",
        "| fp16-d64-b65536-l20-uniform | torch | 210.0 us | 900 GB/s | 30% | 3.00 [2.90-3.10] |",
        "int8-d64-b1-l50-uniform was not measured: out of memory",
        "int4-d64-b1-l50-uniform was left out: no time was left",
        "| fp16-d64-b65536-l20-uniform | fbgemm_gpu | ModuleNotFoundError: No module named 'fbgemm_gpu' |  |  |  |",
    ):
        assert line in page, page
    assert "==== memcheck: compute-sanitizer --tool memcheck" in (fake.out / "log.txt").read_text()


def test_failures_do_not_stop_the_rest(fake: Fake) -> None:
    fake.does["setup.py"] = "echo 'no such kernel'; exit 1"
    fake.does["backend=triton"] = "echo '== 1 failed, 799 passed in 8.00s =='; exit 1"
    fake.does["tool racecheck"] = "kill -SEGV $$"
    done = fake.run()
    assert done.returncode == 1
    outcomes = fake.outcomes()
    bad = {name: step["note"] for name, step in outcomes.items() if step["result"] != "passed"}
    assert bad == {
        "build": "exit status 1; no such kernel",
        "operators, Triton": "exit status 1; 1 failed, 799 passed in 8.00s",
        "racecheck": "exit status -11",
    }
    assert "3 of 12 steps did not pass:" in done.stdout
    assert "  operators, Triton: failed. exit status 1; 1 failed, 799 passed in 8.00s" in done.stdout
    assert "| racecheck | failed |" in (fake.out / "run.md").read_text()
    assert json.loads((fake.out / "run.json").read_text())["benchmarks"] == BENCHMARKS


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def ends(process: int) -> bool:
    """Whether a process that was sent a signal is gone within a second: a signal is not waited for."""
    deadline = time.monotonic() + 1
    while alive(process) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not alive(process)


@pytest.mark.parametrize("stubborn", [False, True])
def test_step_that_takes_too_long_is_stopped(fake: Fake, tmp_path: Path, stubborn: bool) -> None:
    """With everything that it has started; the steps after it have their own time still."""
    children = tmp_path / "children"
    trap = "trap '' TERM; " if stubborn else ""
    fake.does["backend=triton"] = f"{trap}sleep 300 & echo $! $$ > {children}; echo compiling; wait; wait"
    begin = time.monotonic()
    done = fake.run("--seconds", "10")
    assert time.monotonic() - begin < 20
    assert done.returncode == 1
    outcomes = fake.outcomes()
    slow = outcomes.pop("operators, Triton")
    assert slow["result"] == "timed out"
    assert slow["note"].startswith("stopped after ")
    assert slow["note"].endswith("; compiling")
    assert {step["result"] for step in outcomes.values()} == {"passed"}
    assert not [number for number in children.read_text().split() if not ends(int(number))]


def test_time_that_a_step_leaves_is_for_the_next_ones(fake: Fake) -> None:
    """The Triton step may take what those before it have not used."""
    run = load("run")
    place = STEPS.index("operators, Triton")
    before = sum(step.seconds for step in run.STEPS[: place + 1])
    total = sum(step.seconds for step in run.STEPS)
    assert total <= run.SECONDS == 480
    own, granted = run.STEPS[place].seconds * 10 / total, before * 10 / total
    assert own + 1 < granted
    fake.does["backend=triton"] = f"sleep {own + 1:.1f}; echo 1 passed"
    done = fake.run("--seconds", "10")
    assert done.returncode == 0, done.stdout


def test_missing_sanitizer(fake: Fake) -> None:
    done = fake.run(without="compute-sanitizer")
    assert done.returncode == 1
    outcomes = fake.outcomes()
    for name in ("memcheck", "racecheck", "initcheck"):
        assert outcomes.pop(name)["result"] == "not run"
    assert {step["result"] for step in outcomes.values()} == {"passed"}
    assert "  memcheck: not run. compute-sanitizer is neither on the PATH nor in a CUDA toolkit" in done.stdout


def test_sanitizer_in_the_folder_of_the_toolkit(fake: Fake) -> None:
    (fake.toolkit / "bin").mkdir(parents=True)
    fake.does["tool memcheck"] = "echo $0"
    (fake.toolkit / "bin" / "compute-sanitizer").symlink_to(fake.folder / "python3")
    done = fake.run(without="compute-sanitizer")
    assert done.returncode == 0, done.stdout
    assert fake.outcomes()["memcheck"]["note"] == str(fake.toolkit / "bin" / "compute-sanitizer")


def test_prerequisites_that_are_missing(fake: Fake, tmp_path: Path) -> None:
    """They are named in the first line of the record; the steps run all the same."""
    command = [sys.executable, "-I", str(HERE / "prerequisites.py")]
    environment = {"PATH": str(tmp_path / "nothing"), "CUDA_HOME": str(tmp_path / "nowhere")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "nvcc is missing, which is for the build of the CUDA kernels\n" in done.stdout
    assert "compute-sanitizer is missing, which is for memcheck, racecheck and initcheck\n" in done.stdout
    assert "torch" not in done.stdout
    fake.does["prerequisites.py"] = "echo pytest is missing; exit 1"
    done = fake.run()
    assert "  prerequisites: failed. exit status 1; pytest is missing" in done.stdout
    assert {name for name, step in fake.outcomes().items() if step["result"] != "passed"} == {"prerequisites"}


@pytest.mark.parametrize("blind", ["", "racecheck"])
def test_sanitizer_must_find_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str], blind: str
) -> None:
    """Each tool, on a kernel of its own, with the options that the library's are watched with."""
    sanitizer, run = load("sanitizer"), load("run")
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\ntest "$2" = "{blind}" || exit 9\n')
    tool.chmod(0o755)
    monkeypatch.setattr(sanitizer, "program", lambda name: str(tool))
    monkeypatch.setitem(sys.modules, "assumptions", load("assumptions"))
    monkeypatch.setattr(sys.modules["assumptions"], "compile_program", lambda *_, **__: None)
    (step,) = (step for step in run.STEPS if step.name == "sanitizer")
    assert sanitizer.main(step.command[2:]) == bool(blind)
    printed = capfd.readouterr().out
    for name in ("memcheck", "racecheck", "initcheck"):
        (watched,) = (one for one in run.STEPS if one.name == name)
        options = watched.command[1 : watched.command.index(run.PYTHON)]
        assert f"{' '.join(options)} " in printed
    assert printed.endswith(f"found nothing: {blind}\n" if blind else "each tool finds its kernel\n")


def test_kernels_for_the_sanitizer_are_watched(tmp_path: Path) -> None:
    """Their names are in the namespace that the options choose, and there is one for each tool."""
    assumptions = load("assumptions")
    toolkit = sys.modules["cuda_support"].require_toolkit()
    target = tmp_path / "sanitized.ptx"
    assert assumptions.compile_program(target, "-arch=sm_90", "-ptx", source="sanitized.cu") is None
    names = re.findall(r"\.visible \.entry (\w+)", target.read_text())
    assert len(names) == 3, toolkit
    chosen = next(word for word in load("sanitizer").options("memcheck") if word.startswith("kns="))
    assert all(name.startswith(chosen.removeprefix("kns=")) for name in names)


def test_figures_of_benchmarks_that_fail_later_are_kept(fake: Fake) -> None:
    fake.does["benchmark.py"] += "; echo 'fp32-d64: out of memory'; exit 1"
    done = fake.run()
    assert done.returncode == 1
    assert fake.outcomes()["benchmarks"]["result"] == "failed"
    assert json.loads((fake.out / "run.json").read_text())["benchmarks"] == BENCHMARKS


def test_interruption_leaves_a_record(fake: Fake, tmp_path: Path) -> None:
    fake.does["assumptions.py"] = f"echo $$ > {tmp_path}/child; sleep 300"
    process = fake.start()
    while not (tmp_path / "child").exists() or not (tmp_path / "child").read_text().strip():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    record = json.loads((fake.out / "run.json").read_text())
    assert [step["name"] for step in record["steps"]] == STEPS[: STEPS.index("assumptions")]
    assert ends(int((tmp_path / "child").read_text()))


# ---- the steps, on the CPU ---------------------------------------------------------------------------------------


def test_tests_of_the_device_are_right() -> None:
    """On the emulated kernels, which other tests know to be right, and which raise as a GPU's do."""
    options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "--backend=emulated", str(HERE / "device")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert int(done.stdout.split(" passed")[0].split()[-1]) > 500


def test_small_set_is_right() -> None:
    small_set = load("small_set")
    assert os.environ.pop("PYTORCH_NO_CUDA_MEMORY_CACHING") == "1"
    with rk.backend("cpu"):
        assert small_set.right_input(torch.device("cpu"), lookups_only=False) > 50
        assert small_set.wrong_input(torch.device("cpu"), lookups_only=True, modes=()) == 0


class Event:
    """A CUDA event on a machine without a GPU."""

    def __init__(self, enable_timing: bool = True) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def test_benchmarks_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of case in small, on the CPU."""
    benchmark = load("benchmark")
    backend: Callable[[str], Any] = rk.backend
    monkeypatch.setattr(rk, "backend", lambda name: backend("cpu" if name == "cuda" else name))
    monkeypatch.setattr(selection, "why_not", lambda name: "there is no GPU" if name == "triton" else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-4)
    device, seen = torch.device("cpu"), set()
    for case in benchmark.cases():
        kind = (case.dtype, case.ids, case.tables, case.kind)
        if kind in seen:
            continue
        seen.add(kind)
        small = benchmark.replace(case, rows=500, batch=8)
        found = benchmark.measure(small, device, until=0.0)
        assert found["name"] == small.name
        sides = found["sides"]
        assert sides["recsys_kernels, Triton"] == {"absent": "there is no GPU"}
        ours = sides["recsys_kernels, CUDA C++"]
        assert ours["rounds"] >= 3
        assert ours["bytes_per_second"] == pytest.approx(found["bytes"] / ours["seconds"])
        (torch_side,) = (side for name, side in sides.items() if name.startswith("torch"))
        assert torch_side["low"] <= torch_side["ratio"] <= torch_side["high"]
    assert len(seen) >= 8
    run = load("run")
    data = {
        "benchmarks": {"copy_bytes": 1, "copy_bytes_per_second": 1e12, "cases": [found], "failed": {}, "left_out": []}
    }
    assert found["name"] in run.markdown([], data)


def test_benchmarks_measure_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for int8 layers, with each of the peers."""
    benchmark = load("benchmark")
    backend: Callable[[str], Any] = rk.backend
    monkeypatch.setattr(rk, "backend", lambda name: backend("cpu" if name == "cuda" else name))
    monkeypatch.setattr(selection, "why_not", lambda name: "there is no GPU" if name == "triton" else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-4)
    product = "torch._int_mm, the product alone"
    for case in benchmark.layer_cases():
        small = benchmark.replace(case, rows=min(case.rows, 17), width=24, columns=8)
        found = benchmark.measure(small, torch.device("cpu"), until=0.0)
        sides = found["sides"]
        # Weights, two floats for each column, halves in and out.
        assert found["bytes"] == 24 * 8 + 8 * 8 + 2 * small.rows * (24 + 8)
        assert sides["torch, fp16"]["low"] <= sides["torch, fp16"]["high"]
        assert sides["recsys_kernels, Triton"] == {"absent": "there is no GPU"}
        assert ("absent" in sides[product]) == (small.rows <= 16 or small.weights_only)
        assert (
            small.name
            in load("run")._benchmarks(
                {"copy_bytes": 1, "copy_bytes_per_second": 1e12, "cases": [found], "failed": {}, "left_out": []}
            )[3 + 2]
        )


def test_benchmarks_measure_sparse_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("benchmark")
    backend: Callable[[str], Any] = rk.backend
    monkeypatch.setattr(rk, "backend", lambda name: backend("cpu" if name == "cuda" else name))
    monkeypatch.setattr(selection, "why_not", lambda name: "there is no GPU" if name == "triton" else None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(benchmark, "SAMPLE_SECONDS", 1e-4)
    kinds = set()
    for case in benchmark.sparse_cases():
        small = benchmark.replace(case, rows=min(case.rows, 17), width=32, columns=16)
        found = benchmark.measure(small, torch.device("cpu"), until=0.0)
        sides = found["sides"]
        assert sides["torch, dense"]["low"] <= sides["torch, dense"]["high"]
        assert sides["recsys_kernels, Triton"] == {"absent": "there is no GPU"}
        assert ("absent" in sides["torch, CSR"]) == (small.kind != "fp32" or small.pattern != "unstructured")
        kinds.add((small.pattern, small.kind))
        if small.pattern == "2:4":
            # Half of the weights and half a byte for four, a bias, halves in and out.
            assert found["bytes"] == 16 * 16 * 2 + 16 * 4 + 16 * 2 + 2 * small.rows * (32 + 16)
        elif small.pattern == "unstructured":
            # 51 of 512 weights with their columns, the rows' starts, a bias, floats in and out.
            assert found["bytes"] == 51 * 8 + 17 * 4 + 16 * 4 + 4 * small.rows * (32 + 16)
    assert len(kinds) == 4


def test_cases_for_which_no_time_is_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out, which is no failure."""
    benchmark = load("benchmark")
    now = [100.0]

    def measure(case: Any, device: Any, until: float) -> dict[str, Any]:
        now[0] += 10
        return {"name": case.name}

    monkeypatch.setattr(benchmark, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "copy_rate", lambda device: (1, 1.0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    everything = list(benchmark.cases())[:4]
    assert benchmark.run_cases(everything, 125.0) == 0
    *_, record, last = capsys.readouterr().out.splitlines()
    found = json.loads(record)
    names = [case.name for case in everything]
    measured = [case["name"] for case in found["cases"]]
    assert measured + found["left_out"] == names
    assert len(measured) == 2
    assert last == "incomplete: 2 of 4 cases were left out, no time was left"
    assert benchmark.run_cases(everything, math.inf) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["left_out"] == []


def test_bytes_of_a_call() -> None:
    benchmark = load("benchmark")
    work = benchmark.Workload(benchmark.Case("int8", 64, 10, 20, rows=100), torch.device("cpu"))
    # 200 rows of 64 bytes, a scale and a bias of 2 bytes each, an index of 8; 11 offsets; 10 sums of 64 floats.
    assert work.bytes_per_call == 200 * (64 + 4 + 8) + 11 * 8 + 10 * 64 * 4
    work = benchmark.Workload(benchmark.Case("fp16", 64, 10, 20, rows=100, tables=3), torch.device("cpu"))
    assert work.bytes_per_call == 600 * (128 + 8) + 31 * 8 + 30 * 64 * 2


def test_assumptions_compile() -> None:
    assumptions = load("assumptions")
    assumptions_support = sys.modules["cuda_support"]
    assumptions_support.require_toolkit()
    for architecture in ("sm_75", "sm_90"):
        assert assumptions.compile_program(Path(os.devnull), f"-arch={architecture}", "-cubin") is None
