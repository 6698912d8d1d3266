"""A family that is added from a folder elsewhere: doctor, the conformance tests and the benchmarks find it by itself.

The family's files are those of docs/adding-an-operator.md, so that the page is right.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "adding-an-operator.md"
# Where the test puts the files of each of the family's folders.
FOLDERS = {"recsys_kernels/ops/pair_sum": "pair_sum", "bench/ops/pair_sum": "pair_sum_bench"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's family."""
    found = tmp_path_factory.mktemp("toy")
    files = re.findall(r'^```py title="(\S+)/(\S+)"\n(.*?)^```$', PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {place for place, _, _ in files} == set(FOLDERS)
    assert len(files) == 8
    for place, name, text in files:
        path = found / FOLDERS[place] / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.replace("recsys_kernels.ops.pair_sum", "pair_sum"))
    return found


def run(folder: Path, script: str) -> str:
    """Runs a script that has imported the family; returns what the script prints."""
    done = subprocess.run(
        [sys.executable, "-c", f"import recsys_kernels as rk, pair_sum\n{script}"],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])},
        timeout=300,
    )
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_doctor_names_the_family(folder: Path) -> None:
    printed = run(folder, "facts = rk.doctor()\nprint(facts['operators']['pair_sum'])")
    assert re.search(r"^pair_sum +reference +no GPU$", printed, re.MULTILINE)
    assert printed.splitlines()[-1] == "{'cpu': 'reference'}"
    assert re.search(r"^int8_linear +cpu ", printed, re.MULTILINE)


def test_conformance_tests_run_on_the_family(folder: Path) -> None:
    suites = [str(path) for path in sorted(Path(__file__).parent.glob("test_conformance_*.py"))]
    assert len(suites) == 2
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "pair_sum or every_operator_has_samples", *suites]
    printed = run(folder, f"import pytest, sys\nsys.exit(pytest.main({options!r}))")
    passed = int(re.search(r"(\d+) passed", printed)[1])  # type: ignore[index]
    assert passed >= 20
    assert "failed" not in printed
    assert "skipped" not in printed


def test_a_wrong_family_fails_the_conformance_tests(folder: Path) -> None:
    """The suite would not pass just anything."""
    suites = [str(path) for path in sorted(Path(__file__).parent.glob("test_conformance_*.py"))]
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "pair_sum", *suites]
    script = f"""
import pytest, sys
import pair_sum.reference
def wrong(weight, pairs):
    return weight[pairs[:, 0].clamp(0, len(weight) - 1)].double()
pair_sum.reference.pair_sum = wrong
code = pytest.main({options!r})
print("code", int(code))
"""
    printed = run(folder, script)
    assert printed.splitlines()[-1] == "code 1"
    assert "test_fake_kernels_give_the_shape_and_type_of_the_real_ones" in printed
    assert "test_wrong_input" in printed


def test_the_benchmark_measures_the_family(folder: Path) -> None:
    arguments = ["--quick", "--thp", "off", "--case", "pair-sum", "--out", str(folder / "report")]
    printed = run(folder, f"import pair_sum_bench\nfrom bench import report\nassert report.main({arguments!r}) == 0")
    assert "### Sums of pairs" in printed
    assert "| pair-sum-d64-b4096 |" in printed
    (measured,) = json.loads((folder / "report" / "results.json").read_text())["runs"]
    assert [result["family"] for result in measured["results"]] == ["pair_sum", "pair_sum"]
    assert [pair["name"] for result in measured["results"] for pair in result["pairs"]] == ["torch", "torch"]
    again = ["--json", str(folder / "report" / "results.json")]
    assert (
        run(folder, f"import pair_sum_bench\nfrom bench import report\nassert report.main({again!r}) == 0") in printed
    )
