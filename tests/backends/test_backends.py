"""Which implementation runs, and what a process without the native library does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import recsys_kernels as rk
from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import ISA_LEVELS, native, operators
from recsys_kernels.ops.embedding_bag.reference import MODES
from recsys_kernels.testing import assert_matches

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGE = Path(rk.__file__).parent

# ---- compiled code -------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> None:
    torch.compiler.reset()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_functional(mode: str, backend: str) -> None:
    def loss(weight: torch.Tensor, factors: torch.Tensor | None, ids: torch.Tensor, offsets: torch.Tensor) -> Any:
        out = rk.functional.embedding_bag(ids, weight, offsets, mode=mode, per_sample_weights=factors, padding_idx=-2)
        return (out * torch.arange(out.shape[1])).sum()

    compiled = torch.compile(loss, fullgraph=True, backend=backend, dynamic=True)
    for count in (12, 13, 40):
        ids = torch.randint(0, 9, (count,))
        offsets = torch.tensor([0, 3, 3, 9])
        results = []
        for run in (loss, compiled):
            torch.manual_seed(0)
            weight = torch.randn(9, 7, requires_grad=True)
            factors = torch.randn(count, requires_grad=True) if mode != "max" else None
            value = run(weight, factors, ids, offsets)
            value.backward()
            results.append((value, weight.grad, None if factors is None else factors.grad))
        for one, two in zip(*results, strict=True):
            assert (one is None and two is None) or torch.equal(one, two)


def collection() -> rk.EmbeddingBagCollection:
    Config = rk.EmbeddingBagConfig
    return rk.EmbeddingBagCollection([Config("a", 20, 8, ["x", "y"]), Config("b", 30, 5, pooling="max")])


def test_compiled_mapping_of_features() -> None:
    module = collection()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    inputs = {name: (torch.arange(7) % 20, torch.tensor([0, 2, 5])) for name in module.feature_names}
    assert torch.equal(compiled(inputs), module(inputs))


def test_compiled_with_inductor() -> None:
    module = torch.nn.Sequential(rk.EmbeddingBag(20, 8, mode="sum"), torch.nn.ReLU())
    ids = torch.randint(0, 20, (4, 6))
    compiled = torch.compile(module, fullgraph=True)
    assert_matches(compiled(ids), module(ids))
    grads = []
    for run in (module, compiled):
        module.zero_grad()
        run(ids).square().sum().backward()
        grads.append(module[0].weight.grad.clone())
    assert_matches(*grads)


def test_errors_of_compiled_code_are_those_of_the_kernels() -> None:
    compiled = torch.compile(rk.EmbeddingBag(20, 8), fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match="index 20 at position 1"):
        compiled(torch.tensor([[0, 20]]))


# ---- the choice of a backend ----------------------------------------------------------------------------------------


def test_backend_is_put_back() -> None:
    assert selection.chosen("embedding_bag", "cpu") == "cpu"
    with rk.backend("reference"):
        assert selection.chosen("embedding_bag", "cpu") == "reference"
        with rk.backend("cpu"):
            assert selection.chosen("embedding_bag", "cpu") == "cpu"
        assert selection.chosen("embedding_bag", "cpu") == "reference"
    with pytest.raises(ZeroDivisionError), rk.backend("reference"):
        raise ZeroDivisionError
    assert selection.chosen("embedding_bag", "cpu") == "cpu"


def test_backend_holds_for_backward_in_other_threads() -> None:
    """autograd runs backward passes of CPU tensors on the calling thread, but not everybody calls from the first."""
    seen = []
    with rk.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(selection.chosen("embedding_bag", "cpu")))
        thread.start()
        thread.join()
    assert seen == ["reference"]


@pytest.mark.parametrize("name", ["triton", "cuda"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_backend_that_cannot_run_says_why(name: str) -> None:
    with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run here: .*(GPU|CUDA)"), rk.backend(name):
        pass
    assert selection.chosen("embedding_bag", "cpu") == "cpu"


def test_unknown_backend() -> None:
    message = "backend must be one of reference, cpu, triton, cuda, but is 'tpu'"
    with pytest.raises(ValueError, match=message), rk.backend("tpu"):
        pass


def test_cpu_backend_refuses_other_devices() -> None:
    with (
        rk.backend("cpu"),
        pytest.raises(RuntimeError, match="backend 'cpu' was asked for, but the tensors are on meta"),
    ):
        rk.EmbeddingBag(3, 4, device="meta")(torch.zeros(1, 1, dtype=torch.int64, device="meta"))


def test_isa_levels() -> None:
    supported = native.isa_supported()
    assert supported is not None
    assert native.isa() == supported
    with pytest.raises(ValueError, match="ISA level must be one of generic, avx2, avx512, avx512_vnni, but is 'sse9'"):
        native.select_isa("sse9")
    for level in ISA_LEVELS[ISA_LEVELS.index(supported) + 1 :]:
        with pytest.raises(RuntimeError, match=f"support '{supported}' at most, not '{level}'"):
            native.select_isa(level)
    assert native.isa() == supported


def test_levels_are_different_code(isa: str) -> None:
    """Sums differ in the last bit between levels that fuse a multiplication with an addition and those that do not."""
    rng = torch.Generator().manual_seed(3)
    weight, ids = torch.randn(200, 64, generator=rng), torch.randint(0, 200, (50, 40), generator=rng)
    factors = torch.randn(50, 40, generator=rng)
    out = rk.functional.embedding_bag(ids, weight, mode="sum", per_sample_weights=factors)
    native.select_isa("generic")
    generic = rk.functional.embedding_bag(ids, weight, mode="sum", per_sample_weights=factors)
    assert torch.equal(out, generic) == (isa == "generic")
    assert_matches(out, generic)


# ---- environment variables and missing libraries, each in a process of its own ----------------------------------

_REPORT = """
import torch
torch.set_num_threads(1)
import recsys_kernels as rk
from recsys_kernels.backends import selection
from recsys_kernels.backends.registry import native
print(native.isa(), selection.chosen("embedding_bag", "cpu"), native.reason, sep="|")
"""


def run_python(script: str, package_root: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_KERNELS_")}
    clean["PYTHONPATH"] = str(package_root or PACKAGE.parent)
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, env={**clean, **environment}, cwd=package_root or "/", capture_output=True, text=True, timeout=300
    )
    return done


def report(**environment: str) -> list[str]:
    done = run_python(_REPORT, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def test_isa_from_the_environment() -> None:
    supported = native.isa_supported()
    assert report() == [supported, "cpu", "None"]
    assert report(RECSYS_KERNELS_ISA="generic") == ["generic", "cpu", "None"]
    assert report(RECSYS_KERNELS_ISA="") == [supported, "cpu", "None"]
    if supported != "generic":
        assert report(RECSYS_KERNELS_ISA="avx2", RECSYS_KERNELS_BACKEND="cpu") == ["avx2", "cpu", "None"]
        done = run_python("import recsys_kernels as rk\nprint(rk.doctor()['isa'])", RECSYS_KERNELS_ISA="avx2")
        assert done.returncode == 0, done.stderr
        assert "avx2" in done.stdout.splitlines()[-1]


def test_bad_isa_in_the_environment() -> None:
    done = run_python(_REPORT, RECSYS_KERNELS_ISA="mmx")
    assert done.returncode != 0
    assert "recsys_kernels: RECSYS_KERNELS_ISA: the ISA level must be one of generic" in done.stderr


def test_too_high_isa_in_the_environment() -> None:
    """No machine has more than the highest level, so that a lower one is pretended."""
    script = _REPORT.replace(
        "import recsys_kernels as rk",
        "import ctypes\n"
        "class Old(ctypes.CDLL):\n"
        "    def __getattr__(self, name):\n"
        "        if name == 'rk_isa_supported': return lambda: 1\n"
        "        if name == 'rk_isa_select': return lambda level: -1 if level > 1 else 0\n"
        "        return super().__getattr__(name)\n"
        "real, ctypes.CDLL = ctypes.CDLL, lambda path, **k: (Old if '_C.' in str(path) else real)(path, **k)\n"
        "import recsys_kernels as rk",
    )
    done = run_python(script, RECSYS_KERNELS_ISA="avx512_vnni")
    assert done.returncode != 0
    message = "recsys_kernels: RECSYS_KERNELS_ISA: this machine and build support 'avx2' at most, not 'avx512_vnni'"
    assert message in done.stderr


def test_backend_from_the_environment() -> None:
    assert report(RECSYS_KERNELS_BACKEND="reference")[1] == "reference"
    done = run_python(_REPORT, RECSYS_KERNELS_BACKEND="gpu")
    assert done.returncode != 0
    assert "recsys_kernels: RECSYS_KERNELS_BACKEND: backend must be one of" in done.stderr
    done = run_python(_REPORT, RECSYS_KERNELS_BACKEND="cuda")
    assert done.returncode != 0
    assert "recsys_kernels: RECSYS_KERNELS_BACKEND: backend 'cuda' cannot run here" in done.stderr


def copied_package(folder: Path, library: bytes | None) -> Path:
    shutil.copytree(PACKAGE, folder / "recsys_kernels", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    if library is not None:
        (folder / "recsys_kernels" / "_C.so").write_bytes(library)
    return folder


_EVERYTHING = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
import recsys_kernels as rk
assert rk.__file__.startswith(sys.argv[1]), rk.__file__
from recsys_kernels.backends import selection
from recsys_kernels import testing
from recsys_kernels.backends.registry import native
print("reason:", native.reason)
assert native.reason is not None and native.isa() is None and native.isa_supported() is None
assert selection.chosen("embedding_bag", "cpu") == "reference"
for sample in testing.embedding_bag_samples(torch.float32):
    testing.assert_matches(torch.ops.recsys_kernels.embedding_bag(*sample.args), testing.expected_embedding_bag(sample))
bag = rk.EmbeddingBag(50, 9, mode="sum")
ids = torch.randint(0, 50, (4, 6))
torch.nn.functional.embedding_bag(ids, bag.weight, mode="sum").sum().backward()
wanted, bag.weight.grad = bag.weight.grad, None
bag(ids).sum().backward()
testing.assert_matches(bag.weight.grad, wanted)
for bits in (8, 4):
    q = rk.QuantizedEmbeddingBag.from_float(bag, bits)
    testing.assert_matches(q(ids), q.to_float()(ids))
mlp = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.ReLU(), torch.nn.Linear(20, 3))
q = rk.Int8MLP.from_float(mlp)
x = torch.randn(5, 9)
assert (q(x) - mlp(x)).abs().max() < 0.05
q(x).sum().backward()
c = rk.EmbeddingBagCollection([rk.EmbeddingBagConfig("a", 5, 4)])
c({"a": (torch.tensor([0, 1]), torch.tensor([0]))}).sum().backward()
c.quantize()({"a": (torch.tensor([0, 1]), torch.tensor([0]))})
try:
    bag(torch.tensor([[50]]))
except IndexError as error:
    print("IndexError:", error)
for asked in (lambda: rk.backend("cpu").__enter__(), lambda: native.select_isa("generic")):
    try:
        asked()
    except RuntimeError as error:
        print("RuntimeError:", error)
rk.doctor()
"""


@pytest.mark.parametrize("library", [None, b"not a library", b"", b"\x7fELF" + bytes(range(256)) * 40, "truncated"])
def test_without_a_library_the_references_serve(library: bytes | str | None, tmp_path: Path) -> None:
    truncated = library == "truncated"
    if truncated:  # as a full disk leaves it
        assert native.path is not None
        whole = native.path.read_bytes()
        library = whole[: len(whole) // 3]
    assert not isinstance(library, str)
    copied_package(tmp_path, library)
    script = _EVERYTHING.replace("sys.argv[1]", repr(str(tmp_path)))
    done = run_python(script, tmp_path)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}{done.stdout}"
    reason = done.stdout.splitlines()[0]
    assert "not built" in reason if library is None else "_C.so does not load" in reason
    assert "Could not load this library" not in reason
    assert not truncated or "is truncated" in reason
    assert "IndexError: index 50 at position 0" in done.stdout
    assert "RuntimeError: backend 'cpu' cannot run here: " in done.stdout
    assert "RuntimeError: the ISA level 'generic' needs the native library: " in done.stdout


def test_opcheck_without_a_library(tmp_path: Path) -> None:
    root = copied_package(tmp_path, None)
    script = f"""
import torch
torch.set_num_threads(1)
import recsys_kernels
from recsys_kernels.backends.registry import native, operator_samples, operators
assert native.reason is not None and recsys_kernels.__file__.startswith({str(tmp_path)!r})
calls = [(name, args) for name, args in operator_samples()]
firsts = {{name: number for number, (name, _) in reversed(list(enumerate(calls)))}}
for number, (name, args) in enumerate(calls):
    if number % 5 == 0 or firsts[name] == number:
        torch.library.opcheck(operators[name].dispatched, args)
print(sorted(firsts))
"""
    done = run_python(script, root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(sorted(operators))


def test_missing_library_is_said_in_one_warning(tmp_path: Path) -> None:
    done = run_python("import recsys_kernels", copied_package(tmp_path, None))
    assert done.returncode == 0
    assert done.stderr.count("Warning") == 1
    assert "RuntimeWarning: recsys_kernels runs on its PyTorch references" in done.stderr
    assert "not built (no C++ compiler when recsys_kernels was installed, or a platform without" in done.stderr
    assert not run_python("import recsys_kernels").stderr


def test_doctor_prints_and_returns_what_runs(capsys: pytest.CaptureFixture[str]) -> None:
    facts = rk.doctor()
    printed = capsys.readouterr().out
    assert facts["isa"]
    assert str(native.isa()) in str(facts["isa"])
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"]["reference"] is None
    assert facts["backends"]["cpu"] is None
    assert str(native.path) in str(facts["library"])
    for text in (torch.__version__, str(native.isa()), str(native.path), "huge pages", "embedding_bag", "max_norm"):
        assert text in printed
    with rk.backend("reference"):
        assert "reference" in str(rk.doctor()["operators"])


def test_doctor_says_why_something_is_missing(tmp_path: Path) -> None:
    done = run_python("import recsys_kernels as rk\nrk.doctor()", copied_package(tmp_path, b"not a library"))
    assert done.returncode == 0, done.stderr
    assert "_C.so does not load" in done.stdout
    assert "file too short" in done.stdout or "invalid ELF header" in done.stdout


def test_importing_is_cheap(tmp_path: Path) -> None:
    """At most 50 ms of CPU time on top of torch, or 4 % of what torch took in the same process.

    The latter is about as much, and holds where other tests slow both down. The best of several processes, the first of
    which leaves compiled bytecode for the others, as an installation does.
    """
    script = (
        "import sys\nsys.dont_write_bytecode = False\nfrom time import process_time as now\nstart = now()\n"
        "import torch\nmiddle = now()\nimport recsys_kernels\nprint(middle - start, now() - middle)"
    )
    times = []
    for _ in range(8):
        done = run_python(script, PYTHONPYCACHEPREFIX=str(tmp_path))
        times.append(tuple(map(float, done.stdout.split())))
        if any(own < max(0.05, 0.04 * torchs) for torchs, own in times):
            break
    assert any(own < max(0.05, 0.04 * torchs) for torchs, own in times), times


def test_importing_loads_nothing_heavy() -> None:
    script = (
        "import sys, torch\nbefore = set(sys.modules)\nimport recsys_kernels\n"
        "print(*sorted({name.split('.')[0] for name in set(sys.modules) - before}))"
    )
    names = set(run_python(script).stdout.split())
    assert "recsys_kernels" in names
    assert not names & {"triton", "pandas", "pyarrow", "matplotlib", "sklearn", "rich", "safetensors", "scipy"}


# ---- options that torch serves -------------------------------------------------------------------------------------


def test_max_norm_changes_the_table_as_in_torch() -> None:
    torch.manual_seed(4)
    ours, theirs = rk.EmbeddingBag(9, 4, max_norm=0.5), torch.nn.EmbeddingBag(9, 4, max_norm=0.5)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.tensor([[1, 2, 2]])
    assert torch.equal(ours(ids), theirs(ids))
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight[1].norm() < 0.51
    weight = torch.randn(9, 4)
    copy = weight.clone()
    assert torch.equal(
        rk.functional.embedding_bag(ids, weight, max_norm=0.1, norm_type=1.0),
        F.embedding_bag(ids, copy, max_norm=0.1, norm_type=1.0),
    )
    assert torch.equal(weight, copy)
