"""Which implementation CUDA tensors get, and what GPU operators do about wrong input: decided here without a GPU."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import recsys_kernels as rk
from recsys_kernels.backends import registry as _native
from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import BOUNDS_CHECKS, native, operators
from recsys_kernels.ops.embedding_bag import autograd
from recsys_kernels.ops.embedding_bag import collection as collection_module
from recsys_kernels.ops.embedding_bag.faults import Fault

PACKAGE = Path(rk.__file__).parent
ON_GPU: Any = SimpleNamespace(device=torch.device("cuda:0"))
TRITON = selection._triton_reason() is None


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_KERNELS_")}
    clean["PYTHONPATH"] = str(PACKAGE.parent)
    command = [sys.executable, *arguments]
    return subprocess.run(command, env={**clean, **environment}, capture_output=True, text=True, timeout=300)


# ---- reasons -----------------------------------------------------------------------------------------------------


class Machine:
    """Pretends a library with CUDA kernels, a torch for CUDA 13 and one GPU; each may be changed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch
        self.build((13, 0))
        self.torch("13.0")
        self.gpus((9, 0))

    def build(self, release: tuple[int, int] | None) -> None:
        self.patch.setattr(native, "cuda_release", lambda: release)
        self.patch.setattr(native, "cuda_architectures", lambda: (75, 80, 90, 120) if release else ())
        self.patch.setattr(native, "cuda_ptx", lambda: 90 if release else 0)

    def torch(self, cuda: str | None, hip: str | None = None) -> None:
        self.patch.setattr(torch.version, "cuda", cuda)
        self.patch.setattr(torch.version, "hip", hip)

    def gpus(self, *capabilities: tuple[int, int]) -> None:
        self.patch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        self.patch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        self.patch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device])
        self.patch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU number {device}")

    def driver(self, release: tuple[int, int] | None) -> None:
        self.patch.setattr(selection, "driver_release", lambda: release)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def test_cuda_can_run(machine: Machine) -> None:
    assert selection.why_not("cuda") is None


def test_library_without_cuda_kernels(machine: Machine) -> None:
    machine.build(None)
    assert selection.why_not("cuda") == (
        "not built: no CUDA toolkit (nvcc) was found when recsys_kernels was installed"
    )


def test_no_library(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "reason", "it is Sunday")
    assert selection.why_not("cuda") == "the native library is missing: it is Sunday"


def test_torch_for_other_devices(machine: Machine) -> None:
    machine.torch(None)
    assert selection.why_not("cuda") == "this torch is built without CUDA"
    machine.torch(None, hip="7.1")
    assert selection.why_not("cuda") == "this torch is for AMD GPUs"


def test_no_gpu(machine: Machine) -> None:
    machine.gpus()
    assert selection.why_not("cuda") == "torch sees no GPU"


def test_gpus_that_are_too_old(machine: Machine) -> None:
    machine.gpus((7, 5), (6, 1))
    assert selection.why_not("cuda") == (
        "the kernels are built for sm_75 and newer, and GPU 1 (GPU number 1) is sm_61; "
        "CUDA_VISIBLE_DEVICES can leave it out"
    )
    machine.gpus((7, 5), (9, 0))
    assert selection.why_not("cuda") is None


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 0), False), ((7, 5), True), ((8, 0), True), ((8, 9), True), ((9, 0), True), ((10, 0), True),
        ((12, 0), True), ((12, 1), True), ((13, 0), True),
    ],
)  # fmt: skip
def test_gpus_are_served_by_code_or_ptx(machine: Machine, capability: tuple[int, int], served: bool) -> None:
    assert native.serves(capability) == served


def test_library_for_one_architecture(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code serves its generation only, and PTX of an architecture none that is older."""
    monkeypatch.setattr(native, "cuda_architectures", lambda: (80,))
    monkeypatch.setattr(native, "cuda_ptx", lambda: 90)
    assert [number for number in (75, 80, 89, 90, 120) if native.serves(divmod(number, 10))] == [80, 89, 90, 120]
    machine.build(None)
    assert not native.serves((9, 0))


def test_driver_that_is_too_old(machine: Machine) -> None:
    """A torch for CUDA 12 runs on a driver that kernels built with CUDA 13 cannot be loaded by."""
    machine.torch("12.6")
    machine.driver((12, 4))
    assert selection.why_not("cuda") == "the GPU's driver serves CUDA 12.4, and the kernels are built with 13.0"
    machine.driver((13, 0))
    assert selection.why_not("cuda") is None
    machine.driver(None)
    machine.gpus()
    assert selection.why_not("cuda") == "torch sees no GPU"
    machine.gpus((9, 0))
    machine.driver((12, 4))
    machine.build((12, 9))
    assert selection.why_not("cuda") is None


@pytest.mark.parametrize(
    ("status", "version", "release"), [(0, 13000, (13, 0)), (0, 12080, (12, 8)), (1, 0, None), (None, 0, None)]
)
def test_release_that_the_driver_serves(
    monkeypatch: pytest.MonkeyPatch, status: int | None, version: int, release: tuple[int, int] | None
) -> None:
    def ask(pointer: Any) -> int | None:
        pointer._obj.value = version
        return status

    def load(name: str) -> Any:
        assert name == "libcuda.so.1"
        if status is None:
            raise OSError("no such file")
        return SimpleNamespace(cuDriverGetVersion=ask)

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert _native.driver_release() == release


# ---- the choice --------------------------------------------------------------------------------------------------

# What torch's dispatcher holds for CUDA tensors, for a torch that says of itself what it is told to. With a capability,
# what torch calls when it wakes a GPU is called as if it had woken such a one.
_DISPATCH = """
import importlib.util, re, sys, torch
torch.version.cuda, torch.version.hip = {cuda!r}, {hip!r}
if {without_triton!r}:
    find_spec = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import recsys_kernels as rk
from recsys_kernels.backends import selection
if {capability!r}:
    torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
    torch.cuda.get_device_capability, torch.cuda.get_device_name = lambda device: {capability!r}, lambda device: "old"
    for call, _ in torch.cuda._queued_calls:
        if call.__module__.startswith("recsys_kernels"):
            call()
    if selection.chosen("embedding_bag", "cuda") != "cuda":
        assert "GPU 0 (old) is sm_" in selection.why_not("cuda")
from recsys_kernels.backends.registry import operators
for name in sorted(operators):
    table = torch._C._dispatch_dump("recsys_kernels::" + name)
    found = re.search("^CUDA: (.*)$", table, re.MULTILINE)
    in_python = found and re.search("(selection|registry)[.]py", found[1])
    kernel = "none" if found is None else "python" if in_python else "library"
    print(name, selection.chosen(name, "cuda"), kernel)
"""


def dispatched(cuda: str | None, hip: str | None = None, **more: Any) -> dict[str, tuple[str, str]]:
    words = {"cuda": cuda, "hip": hip, "without_triton": False, "capability": None, **more}
    done = run_python("-c", _DISPATCH.format(**words))
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return {name: (chosen, kernel) for name, chosen, kernel in map(str.split, done.stdout.splitlines())}


def cuda_of_library() -> str | None:
    release = native.cuda_release()
    return release and "{}.{}".format(*release)


def built_operators() -> set[str]:
    """The operators that op_cuda.cu implements, by its own words; none if the library was built without nvcc."""
    sources = (PACKAGE.parent / "csrc").rglob("op_cuda.cu")
    named = re.findall(r'rk::implement<&(\w+)>\(m(?:, "(\w+)")?\)', "".join(path.read_text() for path in sources))
    return {name or function for function, name in named} if native.has_cuda else set()


@pytest.mark.parametrize("capability", [None, (9, 0)])
def test_library_serves_cuda_tensors_where_it_can(capability: tuple[int, int] | None) -> None:
    table = dispatched(cuda_of_library(), capability=capability)
    assert set(table) == set(operators)
    for name, found in table.items():
        if name in built_operators():
            assert found == ("cuda", "library"), name
        elif operators[name].has_triton and TRITON:
            assert found == ("triton", "python"), name
        else:
            assert found == ("reference", "none"), name


# Kernels that cannot run: a torch for AMD GPUs, one without CUDA, and a GPU that is older than all that was built.
CANNOT: list[dict[str, Any]] = [
    {"cuda": None, "hip": "7.1"}, {"cuda": None}, {"cuda": cuda_of_library(), "capability": (7, 0)},
]  # fmt: skip


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
@pytest.mark.parametrize("words", CANNOT)
def test_triton_serves_where_the_library_cannot(words: dict[str, Any]) -> None:
    """Also in the place of kernels that the library registered; torch's warning about that is not passed on."""
    for name, found in dispatched(**words).items():
        if operators[name].has_triton:
            assert found == ("triton", "python"), name
        else:
            assert found == ("reference", "python" if name in built_operators() else "none"), name


@pytest.mark.parametrize("words", CANNOT)
def test_reference_serves_where_nothing_else_can(words: dict[str, Any]) -> None:
    """The dispatcher must not go on to kernels that cannot run."""
    for name, found in dispatched(**words, without_triton=True).items():
        assert found[0] == "reference", name
        assert found[1] == "none" if name not in built_operators() else found[1] != "library", name


def test_backends_that_are_asked_for(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_cuda_operators", {"embedding_bag"})
    monkeypatch.setattr(selection, "_triton_reason", lambda: None)
    kernel = torch.ops.recsys_kernels.embedding_bag.default

    def implementation(name: str) -> Any:
        return selection.implementation(name, ON_GPU)

    assert selection.chosen("embedding_bag", "cuda") == "cuda"
    assert selection.chosen("embedding_bag_max", "cuda") == "triton"
    assert selection.chosen("quantize_rowwise", "cuda") == "reference"
    assert implementation("embedding_bag") is kernel
    with rk.backend("cuda"):
        assert selection.chosen("embedding_bag", "cuda") == "cuda"
        assert implementation("embedding_bag") is kernel
        # What the library lacks must not end at Triton, which the dispatcher would pick.
        for name in ("embedding_bag_max", "quantize_rowwise"):
            assert selection.chosen(name, "cuda") == "reference"
            assert implementation(name) is operators[name].reference
        with pytest.raises(RuntimeError, match="backend 'cuda' was asked for, but the tensors are on cpu"):
            rk.functional.embedding_bag(torch.zeros(1, 1, dtype=torch.int64), torch.ones(2, 3))
    with rk.backend("reference"):
        assert implementation("embedding_bag") is operators["embedding_bag"].reference


@pytest.mark.skipif(not TRITON, reason="Triton is not installed")
def test_triton_can_be_asked_for_where_the_library_serves(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_cuda_operators", {"embedding_bag"})
    with rk.backend("triton"):
        assert selection.chosen("embedding_bag", "cuda") == "triton"
        assert selection.implementation("embedding_bag", ON_GPU) is operators["embedding_bag"].triton
        assert selection.implementation("quantize_rowwise", ON_GPU) is operators["quantize_rowwise"].reference


def test_doctor_agrees(machine: Machine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with_triton = {name for name, operator in operators.items() if operator.has_triton}
    monkeypatch.setattr(selection, "_cuda_operators", with_triton)
    monkeypatch.setattr(selection, "_triton_reason", lambda: None)
    facts = rk.doctor()
    assert facts["cuda"] == {"release": "13.0", "architectures": (75, 80, 90, 120)}
    assert facts["backends"]["cuda"] is None
    assert facts["operators"]["embedding_bag"] == {"cpu": "cpu", "cuda": "cuda"}
    assert facts["operators"]["quantize_rowwise"] == {"cpu": "cpu", "cuda": "reference"}
    printed = capsys.readouterr().out
    assert "CUDA C++    built with 13.0 for sm_75 sm_80 sm_90 sm_120\n" in printed
    assert re.search(r"^cuda +ready$", printed, re.MULTILINE)
    assert re.search(r"^embedding_bag +cpu +cuda$", printed, re.MULTILINE)
    with rk.backend("cuda"):
        assert rk.doctor()["operators"]["embedding_bag"]["cuda"] == "cuda"
    machine.build(None)
    monkeypatch.setattr(selection, "_cuda_operators", set())
    capsys.readouterr()
    facts = rk.doctor()
    assert facts["cuda"] is None
    assert facts["operators"]["embedding_bag"]["cuda"] == "triton"
    printed = capsys.readouterr().out
    assert "CUDA C++    not in the library\n" in printed
    assert re.search(r"^cuda +not built: no CUDA toolkit \(nvcc\) was found", printed, re.MULTILINE)


# ---- wrong input -------------------------------------------------------------------------------------------------


@pytest.fixture
def selected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the CUDA kernels were told."""
    told: list[str] = []
    monkeypatch.setattr(native, "select_bounds_check", told.append)
    return told


def test_mode_is_put_back(selected: list[str]) -> None:
    assert selection.bounds_mode() == "raise"
    with rk.bounds_check("clamp"):
        assert selection.bounds_mode() == "clamp"
        with rk.bounds_check("ignore"):
            assert selection.bounds_mode() == "ignore"
        assert selection.bounds_mode() == "clamp"
    with pytest.raises(ZeroDivisionError), rk.bounds_check("clamp"):
        raise ZeroDivisionError
    assert selection.bounds_mode() == "raise"
    assert selected == ["clamp", "ignore", "clamp", "raise", "clamp", "raise"]


def test_unknown_mode(selected: list[str]) -> None:
    message = "bounds_check must be one of raise, clamp, ignore, but is 'warn'"
    with pytest.raises(ValueError, match=message), rk.bounds_check("warn"):
        pass
    assert not selected


def test_modes_have_the_numbers_of_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []
    fake = SimpleNamespace(rk_cuda_select_bounds_check=numbers.append)
    monkeypatch.setattr(native, "_functions", fake)
    for mode in BOUNDS_CHECKS:
        native.select_bounds_check(mode)
    assert numbers == [0, 1, 2]
    if native.has_cuda:
        header = (PACKAGE.parent / "csrc" / "cuda" / "faults.cuh").read_text()
        named = re.search(r"enum class BoundsCheck[^{]*{(.*?)};", header, re.DOTALL)
        assert named is not None
        assert tuple(re.findall(r"^\s*(\w+),", named[1], re.MULTILINE)) == BOUNDS_CHECKS


@pytest.mark.parametrize("mode", BOUNDS_CHECKS)
def test_the_cpu_always_raises(mode: str) -> None:
    with rk.bounds_check(mode), pytest.raises(IndexError, match="index 9 at position 1"):
        rk.EmbeddingBag(9, 4)(torch.tensor([[0, 9]]))


class Waiting:
    """A GPU with a fault, which can be seen only after waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, faults: dict[int, Fault]) -> None:
        self.waited: list[int] = []
        self.faults = faults
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
        monkeypatch.setattr(torch.cuda, "synchronize", self.waited.append)
        monkeypatch.setattr(native, "take_fault", self.take)

    def take(self, device: int) -> Fault | None:
        assert self.waited[-1] == device
        return self.faults.pop(device, None)


@pytest.mark.parametrize(("asked", "device"), [(None, 2), ("cuda", 2), ("cuda:1", 1), (3, 3)])
def test_check_bounds_waits_for_one_device(
    monkeypatch: pytest.MonkeyPatch, asked: str | int | None, device: int
) -> None:
    waiting = Waiting(monkeypatch, {device: Fault(1, -1, 5, 50, 50, -1)})
    with pytest.raises(IndexError):
        rk.check_bounds(asked)
    rk.check_bounds(asked)
    assert waiting.waited == [device, device]


def test_check_bounds_has_the_words_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault is one that the CPU's operators are made to raise as well."""
    bag = rk.EmbeddingBag(50, 4)
    ids = torch.tensor([1, 2, 3])
    collection = [torch.ones(9, 2), torch.ones(5, 2)]
    plan = torch.tensor([[0, 2, 0, 0, 0, 0], [1, 2, 2, 0, 0, 0]])
    lookup = torch.ops.recsys_kernels.embedding_bag_collection
    offsets = torch.tensor([0, 1, 2])
    cases: list[tuple[Fault, Any]] = [
        (Fault(1, -1, 1, 70, 50, -1), lambda: bag(torch.tensor([[3, 70]]))),
        (Fault(1, -1, 0, -4, 50, -1), lambda: bag(torch.tensor([[-4, 3]]))),
        (Fault(2, -1, 1, 9, 3, -1), lambda: bag(ids, torch.tensor([0, 9]))),
        (Fault(1, 1, 1, 8, 5, 1), lambda: lookup(collection, [], plan, ids[:2] + 6, offsets, None, 4, torch.float32)),
        (Fault(3, -1, 0, 0, 0, -1), lambda: lookup(collection, [], plan - 1, ids, offsets, None, 4, torch.float32)),
    ]
    for fault, call in cases:
        with pytest.raises((IndexError, RuntimeError)) as on_cpu:
            call()
        Waiting(monkeypatch, {2: fault})
        with pytest.raises((IndexError, RuntimeError)) as on_gpu:
            rk.check_bounds()
        # torch's own operators prefix nothing, so the texts are the same to the letter.
        assert str(on_gpu.value) == str(on_cpu.value)
        assert isinstance(on_gpu.value, type(on_cpu.value))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_wrong_indices_count_as_padding_or_the_nearest_row(selected: list[str], dtype: torch.dtype) -> None:
    indices = torch.tensor([0, 7, -1, 3, 5, 6], dtype=dtype)
    for mode, padding, wanted in (
        ("ignore", 5, ([0, 7, 7, 3, 7, 6], 7, 8)),
        ("ignore", -1, ([0, 7, 7, 3, 5, 6], 7, 8)),
        ("clamp", 5, ([0, 6, 0, 3, 5, 6], 5, 7)),
    ):
        with rk.bounds_check(mode):
            found, *rest = autograd._as_counted(indices, padding, 7)
        assert found.dtype == dtype
        assert (found.tolist(), *rest) == wanted


@pytest.mark.parametrize("earlier", [False, True])
def test_collections_name_their_own_tables(monkeypatch: pytest.MonkeyPatch, earlier: bool) -> None:
    """What an earlier call left may be about another collection's tables."""
    tables = [rk.EmbeddingBagConfig("user", 5, 4), rk.EmbeddingBagConfig("item", 5, 4)]
    collection = rk.EmbeddingBagCollection(tables)
    message = "index 8 at position 1 of indices is out of range for the table of feature #1 with 5 rows"
    message += " (found by an earlier call)" if earlier else ""

    def lookup(*args: Any) -> None:
        raise IndexError(message)

    monkeypatch.setattr(collection_module, "embedding_bag_collection", lookup)
    with pytest.raises(IndexError) as caught:
        collection(torch.tensor([0, 8]), torch.tensor([0, 1, 2]))
    named = message.replace("the table of feature #1", "table 'item' (feature 'item')")
    assert str(caught.value) == (message if earlier else named)


def test_check_bounds_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rk.check_bounds()
    rk.check_bounds("cpu")


def test_faults_come_as_the_library_writes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(device: int, record: Any) -> int:
        record[:] = [1, -1, 5, 1 << 40, 50, -1]
        return int(device == 1)

    monkeypatch.setattr(
        native, "_functions", SimpleNamespace(rk_cuda_take_fault=take, rk_cuda_select_bounds_check=None)
    )
    assert native.take_fault(0) is None
    assert native.take_fault(1) == Fault(1, -1, 5, 1 << 40, 50, -1)


def test_a_library_without_cuda_kernels_has_no_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_functions", SimpleNamespace())
    assert not native.has_cuda
    assert native.cuda_release() is None
    assert native.cuda_architectures() == ()
    assert native.take_fault(0) is None
    native.select_bounds_check("clamp")


# ---- the command line --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("RECSYS_KERNELS_ISA", "mmx", "the ISA level must be one of generic, "),
        ("RECSYS_KERNELS_BACKEND", "gpu", "backend must be one of reference, cpu, triton, cuda, but is 'gpu'"),
    ],
)
def test_bad_environment_is_an_error_of_the_import_and_one_line(variable: str, value: str, message: str) -> None:
    script = Path(sys.executable).parent / "recsys-kernels"
    for command in (["-m", "recsys_kernels", "doctor"], [str(script), "--help"], ["-c", "import recsys_kernels"]):
        done = run_python(*command, **{variable: value})
        assert done.returncode == 2
        assert done.stderr.startswith(f"recsys_kernels: {variable}: {message}")
        assert done.stderr.count("\n") == 1
        assert not done.stdout
    caught = "try:\n    import recsys_kernels\nexcept ValueError as error:\n    print(error)"
    done = run_python("-c", caught, **{variable: value})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{variable}: {message}")
