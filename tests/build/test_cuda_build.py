"""How the build finds a CUDA toolkit, and what it makes of it. No GPU is needed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cuda_support import ROOT, build_script, require_toolkit

from recsys_kernels.backends.registry import native

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="CUDA kernels are built on Linux")


# ---- which toolkit -----------------------------------------------------------------------------------------------


def make_toolkit(root: Path, release: str = "13.0", known: str = "sm_75 sm_80 sm_90 sm_100 sm_120 sm_121") -> Path:
    """A folder that looks like a toolkit: its nvcc answers what the build asks, and compiles nothing."""
    (root / "bin").mkdir(parents=True)
    (root / "lib64").mkdir()
    (root / "lib64" / "libcudart_static.a").touch()
    nvcc = root / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        f"  --version) echo 'Cuda compilation tools, release {release}, V{release}.88';;\n"
        f"  --list-gpu-code) printf '%s\\n' {known};;\n"
        "  *) echo 'no such kernel' >&2; exit 3;;\n"
        "esac\n"
    )
    nvcc.chmod(0o755)
    return root


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """setup.py on a machine without any toolkit, in an environment with no packages."""
    setup = build_script()
    for name in ("CUDA_HOME", "CXX"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "tools").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'tools'}:/bin")
    monkeypatch.setattr(setup, "TOOLKIT_FOLDERS", (tmp_path / "usual",))
    monkeypatch.setattr(setup.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path / "site-packages")})
    monkeypatch.setattr(setup.sys, "path", [str(tmp_path / "lib")])
    if shutil.which("nvcc"):
        monkeypatch.setenv("PATH", str(tmp_path / "tools"))
    return setup


def test_no_toolkit(bare: Any) -> None:
    assert bare.cuda_toolkit() is None


def test_toolkit_that_cuda_home_names(bare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_toolkit(tmp_path / "usual")
    monkeypatch.setenv("CUDA_HOME", str(make_toolkit(tmp_path / "mine", "12.9")))
    found = bare.cuda_toolkit()
    assert found.nvcc == tmp_path / "mine" / "bin" / "nvcc"
    assert found.release == (12, 9)
    assert found.runtime == tmp_path / "mine" / "lib64"


def test_cuda_home_without_a_compiler_is_an_error(bare: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_toolkit(tmp_path / "usual")
    (make_toolkit(tmp_path / "runtime") / "bin" / "nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "runtime"))
    with pytest.raises(SystemExit, match=f"CUDA_HOME names no CUDA toolkit with nvcc .*: {tmp_path}/runtime"):
        bare.cuda_toolkit()


def test_toolkit_of_pips_packages_comes_first(bare: Any, tmp_path: Path) -> None:
    make_toolkit(tmp_path / "usual")
    make_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    assert bare.cuda_toolkit().nvcc == tmp_path / "site-packages" / "nvidia" / "cu13" / "bin" / "nvcc"


def test_toolkit_behind_a_script_on_the_path(bare: Any, tmp_path: Path) -> None:
    """A wrapper's own folder says nothing; what it would run does."""
    make_toolkit(tmp_path / "usual")
    make_toolkit(tmp_path / "deep" / "cuda-13")
    script = tmp_path / "tools" / "nvcc"
    script.write_text(f"#!/bin/sh\necho '#$ _SPACE_= ' >&2\necho '#$ TOP={tmp_path}/deep/cuda-13/bin/..' >&2\n")
    script.chmod(0o755)
    assert bare.cuda_toolkit().nvcc == tmp_path / "deep" / "cuda-13" / "bin" / "nvcc"


def test_folders_without_a_compiler_are_passed_over(bare: Any, tmp_path: Path) -> None:
    """torch for CUDA brings the runtime's folder, without nvcc."""
    packages = make_toolkit(tmp_path / "site-packages" / "nvidia" / "cu13")
    (packages / "bin" / "nvcc").unlink()
    make_toolkit(tmp_path / "usual")
    assert bare.cuda_toolkit().nvcc == tmp_path / "usual" / "bin" / "nvcc"


def test_toolkit_without_a_static_runtime_is_passed_over(bare: Any, tmp_path: Path) -> None:
    (make_toolkit(tmp_path / "usual") / "lib64" / "libcudart_static.a").unlink()
    if not list(Path("/usr/lib").glob("*-linux-gnu/libcudart_static.a")):
        assert bare.cuda_toolkit() is None


def test_older_toolkit_builds_what_it_knows(bare: Any, tmp_path: Path) -> None:
    make_toolkit(tmp_path / "usual", "11.8", "sm_50 sm_75 sm_80 sm_86 sm_89 sm_90")
    found = bare.cuda_toolkit()
    assert found.architectures == (90, 75, 80, 86, 89)
    flags = bare.nvcc_flags(found.architectures)
    assert [flag for flag in flags if flag.startswith("-gencode")] == [
        "-gencode=arch=compute_90,code=[sm_90,compute_90]",
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,sm_86,sm_89]",
    ]


@pytest.mark.parametrize(
    ("command", "compiler"),
    [("g++", "g++"), ("ccache /opt/gcc/g++", "/opt/gcc/g++"), ("clang++ -m64", "clang++")],
)
def test_host_compiler_is_that_of_the_other_files(command: str, compiler: str) -> None:
    assert build_script().host_compiler(command) == compiler


def test_toolkit_of_this_machine() -> None:
    found = require_toolkit()
    assert found.release >= (12, 8)
    assert sorted(found.architectures) == [75, 80, 86, 89, 90, 100, 120]


# ---- builds ------------------------------------------------------------------------------------------------------


def small_checkout(folder: Path) -> Path:
    """The sources without kernels, which take long to compile, for one GPU architecture."""
    folder.mkdir()
    shutil.copytree(
        ROOT / "csrc",
        folder / "csrc",
        ignore=shutil.ignore_patterns("kernel.cpp", "op_cuda.cu", "int8", "sparse"),
    )
    (folder / "recsys_kernels").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "recsys_kernels/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    text = (ROOT / "setup.py").read_text()
    one = re.sub(r"^GPU_CODE = .*$", "GPU_CODE = {90: (90,)}", text, flags=re.MULTILINE)
    assert one != text
    (folder / "setup.py").write_text(one)
    return folder


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True, timeout=600
    )


def test_build_without_a_toolkit_says_so_in_one_line(tmp_path: Path) -> None:
    folder = small_checkout(tmp_path / "checkout")
    text = (folder / "setup.py").read_text()
    text = re.sub(r"^TOOLKIT_FOLDERS = .*$", "TOOLKIT_FOLDERS = ()", text, flags=re.MULTILINE)
    (folder / "setup.py").write_text(text.replace("nvidia/cu1[0-9]", "nvidia/none"))
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("g++", "ninja", "as", "ld"):
        (tools / tool).symlink_to(shutil.which(tool) or "/nowhere")
    done = build(folder, PATH=str(tools), CXX="g++", CUDA_HOME="")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "nvcc" in line]
    assert len(lines) == 1, lines
    assert "no CUDA toolkit with nvcc found; building the CPU kernels (GPUs: Triton)" in lines[0]
    symbols = subprocess.run(
        ["nm", "-D", str(folder / "recsys_kernels" / "_C.so")], capture_output=True, text=True, check=True
    ).stdout
    assert "rk_cuda_release" in symbols
    assert "rk_cuda_select_bounds_check" not in symbols


def test_failing_nvcc_is_an_error(tmp_path: Path) -> None:
    folder = small_checkout(tmp_path / "checkout")
    done = build(folder, CUDA_HOME=str(make_toolkit(tmp_path / "broken")))
    assert done.returncode != 0
    assert "no such kernel" in done.stdout + done.stderr
    assert "compiling the native kernels failed" in done.stderr
    assert not list(folder.rglob("*.so"))


def test_build_names_the_compiler_and_its_targets(tmp_path: Path) -> None:
    """And builds in folders whose names shells and ninja treat in their own ways; reads headers' times, too."""
    found = require_toolkit()
    folder = small_checkout(tmp_path / "it's a $HOME: (of mine)")
    done = build(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    release = ".".join(map(str, found.release))
    assert f"recsys_kernels: CUDA kernels by nvcc {release} ({found.nvcc}) for sm_90\n" in done.stdout
    assert "no work to do" in build(folder).stdout
    (folder / "csrc" / "cuda" / "cuda.cuh").touch()
    again = build(folder)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "/nvcc" in again.stdout, "ninja did not learn which headers nvcc read"
    assert "cuda/build.cpp" not in again.stdout


# ---- the library -------------------------------------------------------------------------------------------------


def test_library_of_this_environment_has_cuda_kernels() -> None:
    """In CI it was compiled with the toolkit that the test extra brings; elsewhere it may have been without one."""
    if not native.has_cuda and not os.environ.get("CI"):
        pytest.skip("this environment's library was built without nvcc")
    found = require_toolkit()
    assert native.has_cuda
    assert native.cuda_release() == found.release
    assert native.cuda_architectures() == tuple(sorted(build_script().GPU_ARCHITECTURES))


def test_ptx_is_of_the_newest_group_that_is_built() -> None:
    script = build_script()
    assert script.kept_ptx(script.GPU_ARCHITECTURES) == 90
    assert script.kept_ptx((120,)) == 90
    assert script.kept_ptx((75, 80, 86)) == 80
    gencode = [flag for flag in script.nvcc_flags((75, 80)) if flag.startswith("-gencode")]
    assert gencode == [
        "-gencode=arch=compute_75,code=[sm_75]",
        "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    ]


def test_library_holds_code_for_every_architecture() -> None:
    if not native.has_cuda:
        test_library_of_this_environment_has_cuda_kernels()
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def listed(what: str) -> set[int]:
        text = subprocess.run([str(tool), what, str(native.path)], capture_output=True, text=True, check=True).stdout
        return {int(number) for number in re.findall(r"\.sm_(\d+)\.", text)}

    assert listed("--list-elf") == set(native.cuda_architectures())
    assert listed("--list-ptx") == {native.cuda_ptx()} == {90}
