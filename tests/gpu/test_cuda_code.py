"""What nvcc makes of the CUDA kernels for GPUs that this machine need not have, held against a table of budgets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_budgets import ARCHITECTURES, BUDGETS
from cuda_code import Breach, Budget, Kernel, as_table, breaches, kernels_in, kernels_of

from recsys_kernels.backends.registry import native

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from cuda_support import build_script, require_toolkit  # noqa: E402

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux")


# ---- the kernels of the library ----------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_budgets(architecture: str, tmp_path: Path) -> None:
    if not native.has_cuda:
        complaint = "the library was built without nvcc, so that there are no kernels to look at"
        if os.environ.get("CI"):
            pytest.fail(complaint)
        pytest.skip(complaint)
    assert native.path is not None
    wrong = breaches(kernels_of(native.path, architecture, tmp_path), BUDGETS, architecture)
    assert not wrong, f"\n{as_table(wrong)}"


# ---- the check itself --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wrong_kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    """wrong.cu for sm_90, compiled with the flags of the build."""
    toolkit, script = require_toolkit(), build_script()
    cubin = tmp_path_factory.mktemp("wrong") / "wrong.cubin"
    flags = [flag for flag in script.nvcc_flags((90,)) if not flag.startswith("-gencode")]
    command = [str(toolkit.nvcc), *flags, "-arch=sm_90", "-cubin", str(HERE / "wrong.cu"), "-o", str(cubin)]
    subprocess.run(command, check=True)
    return kernels_in(cubin)


_GOOD = Budget({"sm_90": 32}, shared=0, wide_loads=4, runs={128: (4,)})


def test_kernel_within_its_budget(wrong_kernels: dict[str, Kernel]) -> None:
    name = "copy<float4>"
    assert breaches({name: wrong_kernels[name]}, {name: _GOOD}, "sm_90") == []


@pytest.mark.parametrize(
    ("name", "budget", "what"),
    [
        ("copy<float4>", Budget({"sm_90": 8}, 0, 4), {"registers"}),
        ("copy<float>", _GOOD, {"wide loads", "128-bit loads under way in loop 1 of 1"}),
        ("one_by_one", _GOOD, {"128-bit loads under way in loop 1 of 1"}),
        ("copy<float4>", _GOOD._replace(runs={128: (4, 1)}), {"128-bit loads under way in loop 2 of 2"}),
        ("in_local_memory", Budget({"sm_90": 255}, 0, 0), {"bytes of local memory", "instructions on local memory"}),
        ("in_shared_memory", Budget({"sm_90": 255}, 2048, 0), {"bytes of shared memory"}),
        ("copy<float4>", Budget({"sm_90": 32}, 0, 4, needs={"IMMA": 1, "LDG": 4}), {"IMMA"}),
    ],
)
def test_each_fault_is_found(wrong_kernels: dict[str, Kernel], name: str, budget: Budget, what: set[str]) -> None:
    found = breaches({name: wrong_kernels[name]}, {name: budget}, "sm_90")
    assert {breach.what for breach in found} == what


def test_local_memory_only_where_it_may_be(wrong_kernels: dict[str, Kernel]) -> None:
    name = "in_local_memory"
    budget = Budget({"sm_90": 255}, 0, 0, local={"sm_90": (256, 1000)})
    assert breaches({name: wrong_kernels[name]}, {name: budget}, "sm_90") == []
    found = breaches({name: wrong_kernels[name]}, {name: budget._replace(local={"sm_90": (255, 1)})}, "sm_90")
    assert {breach.what for breach in found} == {"bytes of local memory", "instructions on local memory"}


def test_lists_must_agree(wrong_kernels: dict[str, Kernel]) -> None:
    found = breaches(wrong_kernels, {"copy<float4>": _GOOD, "gone": _GOOD}, "sm_90")
    assert {(breach.kernel, breach.what) for breach in found} == {
        ("copy<float>", "in the table"),
        ("in_local_memory", "in the table"),
        ("one_by_one", "in the table"),
        ("in_shared_memory", "in the table"),
        ("gone", "in the library"),
    }


def test_breaches_are_a_table() -> None:
    found = [Breach("copy<float>", "sm_90", "wide loads", 0, "4 or more", "fewer bytes of rows are in flight")]
    header, row = as_table(found).splitlines()
    assert header.split() == ["kernel", "architecture", "what", "was", "may", "why"]
    assert row.split()[:2] == ["copy<float>", "sm_90"]
    assert header.index("was") == row.index(" 0 ") + 1
