"""The native library: how it is built, what it needs, and that it stays inside of its memory."""

from __future__ import annotations

import email
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from cuda_support import build_script
from simt.support import cache_folder, compiled, kernel_sources
from simt.support import require as require_emulation
from support import isa_levels

import recsys_kernels as rk
from recsys_kernels.backends.registry import ISA_LEVELS, native

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
PACKAGE = Path(rk.__file__).parent
TORCH = Path(torch.__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF files")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(  # type: ignore[call-overload]
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    return done


def checked(*command: str | Path, **options: object) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def compiler() -> str:
    return os.environ.get("CXX", "g++").split()[0]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel and the objects it was linked from, built from this source tree for the CPU.

    CUDA kernels would double the time. They are in the library that the other tests load.
    """
    folder = tmp_path_factory.mktemp("build")
    checked(
        *(sys.executable, "setup.py", "-q", "egg_info", "--egg-base", folder),
        *("build", "--build-base", folder / "build"),
        *("build_ext", "--without-cuda"),
        # It would build once more, with options of its own.
        *("bdist_wheel", "--skip-build", "--dist-dir", folder / "dist", "--bdist-dir", folder / "bdist"),
        cwd=ROOT,
    )
    return folder


def built_objects(build: Path) -> dict[str, Path]:
    found = {path.name: path for path in build.glob("build/temp*/native/*.o")}
    assert len(found) >= 3, "no objects were left"
    return found


def built_library(build: Path) -> Path:
    (library,) = build.glob("build/lib*/recsys_kernels/_C.so")
    return library


def objects_of_level(build: Path, level: str) -> list[Path]:
    found = [path for name, path in built_objects(build).items() if name.endswith(f"_{level}.o")]
    assert found, f"no object for {level}"
    return found


# ---- what the library needs -----------------------------------------------------------------------------------------


def stable_functions() -> set[str]:
    """The C functions that torch 2.10 has, from the installed headers with the target version's guards applied."""
    include = TORCH / "include"
    headers = (
        "torch/csrc/stable/c/shim.h",
        "torch/csrc/inductor/aoti_torch/c/shim.h",
        "torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h",  # what torch/csrc/stable/ops.h calls
    )
    text = checked(
        *(compiler(), "-E", "-P", "-x", "c++", "-std=c++17", f"-I{include}"),
        *("-DTORCH_TARGET_VERSION=0x020a000000000000", "-"),
        input="".join(f"#include <{header}>\n" for header in headers),
    )
    found = set(re.findall(r"\b((?:aoti_)?torch_\w+)\s*\(", text))
    assert {"aoti_torch_empty_strided", "torch_call_dispatcher", "torch_parallel_for"} <= found
    assert "torch_exception_get_what" not in found, "that came with torch 2.13"
    return found


def foreign_symbols(library: Path) -> list[str]:
    """Undefined symbols beyond torch 2.10's C functions and the versioned ones of the C and C++ runtimes.

    Weak ones may be missing where the library is loaded: the stream is that of a CUDA torch.
    """
    allowed = stable_functions()
    runtime = re.compile(r"@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+( \(\d+\))?$")
    found = []
    for line in checked("readelf", "-W", "--dyn-syms", library).splitlines():
        parts = line.split(maxsplit=7)
        if len(parts) < 8 or parts[6] != "UND":
            continue
        name, binding = parts[7], parts[4]
        weak = binding == "WEAK" and name in (
            "_ITM_deregisterTMCloneTable",
            "_ITM_registerTMCloneTable",
            "__gmon_start__",
            "aoti_torch_get_current_cuda_stream",
        )
        if not weak and name not in allowed and not runtime.search(name):
            found.append(name)
    return found


def test_library_needs_only_the_stable_interface_of_torch(build: Path) -> None:
    for library in {built_library(build), native.path}:
        assert library is not None
        assert foreign_symbols(library) == []
        dynamic = checked("readelf", "-W", "-d", library)
        needed = set(re.findall(r"NEEDED.*\[(.*)\]", dynamic))
        assert needed >= {"libtorch.so", "libtorch_cpu.so"}
        assert all(
            re.match(r"lib(torch|torch_cpu|stdc\+\+|m|gcc_s|c|pthread|dl|rt)\.so|ld-linux", name) for name in needed
        )
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic


def test_the_check_of_symbols_finds_what_it_looks_for() -> None:
    found = foreign_symbols(TORCH / "lib" / "libtorch_python.so")
    assert any(name.startswith("_ZN3c10") for name in found)
    assert any(name.startswith("Py") for name in found)


def test_library_defines_little(build: Path) -> None:
    """Only the level's functions are for others; weak symbols of the C++ library are in everybody's way to no harm."""
    named = {"rk_isa_supported", "rk_isa_current", "rk_isa_select", "rk_cuda_release", "rk_cuda_architectures"}
    named |= {"rk_cuda_ptx"}
    of_cuda = {"rk_cuda_select_bounds_check", "rk_cuda_take_fault"} if native.cuda_release() else set()
    assert native.path is not None
    for library, wanted in ((built_library(build), named), (native.path, named | of_cuda)):
        defined = checked("nm", "-D", "--defined-only", library).splitlines()
        strong = {line.split()[-1] for line in defined if line.split()[-2] in "TDBR"}
        assert strong - {"_edata", "_end", "__bss_start", "_init", "_fini"} == wanted


# ---- the objects of each level ----------------------------------------------------------------------------------


def disassembly(path: Path) -> str:
    return checked("objdump", "-d", "--no-show-raw-insn", path)


def test_every_level_is_built(build: Path) -> None:
    levels = ISA_LEVELS if X86 else ISA_LEVELS[:1]
    for level in levels:
        objects_of_level(build, level)
    assert native.isa_supported() in levels


@pytest.mark.parametrize("level", ISA_LEVELS if X86 else ISA_LEVELS[:1])
def test_objects_of_a_level_share_nothing(build: Path, level: str) -> None:
    """An inline function compiled for one level must never be the one that the linker keeps for all."""
    for path in objects_of_level(build, level):
        symbols = [line.split() for line in checked("nm", path).splitlines()]
        shared = [parts[-1] for parts in symbols if parts[-2] in "WwVvu"]
        assert shared == [], path.name
        visible = [parts[-1] for parts in symbols if parts[-2] in "TDBRC"]
        assert visible
        assert all(name.endswith(f"_{level}") for name in visible), path.name


@pytest.mark.skipif(not X86, reason="levels of x86-64")
def test_no_level_uses_the_instructions_of_a_higher_one(build: Path) -> None:
    wide, wider = re.compile(r"%ymm"), re.compile(r"%zmm|%k[0-7]\b|%[xy]mm(1[6-9]|2\d|3[01])\b")
    levels = {level: "".join(map(disassembly, objects_of_level(build, level))) for level in ISA_LEVELS}
    by_level = {path for level in ISA_LEVELS for path in objects_of_level(build, level)}
    common = "".join(disassembly(path) for path in built_objects(build).values() if path not in by_level)
    for name, text in (("generic", levels["generic"]), ("common", common)):
        assert len(text) > 10_000, name
        assert not wide.search(text), name
        assert not re.search(r"\tv[a-z]", text), f"{name} holds VEX-encoded instructions"
    for text in (levels["generic"], levels["avx2"], common):
        assert not wider.search(text)
    vnni = re.compile(r"vpdp(bu|ws)sd")
    assert not vnni.search(levels["generic"] + levels["avx2"] + levels["avx512"] + common)
    assert wide.search(levels["avx2"])
    assert wider.search(levels["avx512"])
    assert wider.search(levels["avx512_vnni"])


# ---- the wheel and the build -----------------------------------------------------------------------------------


def test_wheel_serves_every_python(build: Path) -> None:
    (wheel,) = (build / "dist").glob("*.whl")
    assert re.fullmatch(r"recsys_kernels-[\d.]+-py3-none-linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata_name,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        (wheel_name,) = [name for name in names if name.endswith(".dist-info/WHEEL")]
        metadata = email.message_from_bytes(archive.read(metadata_name))
        tags = email.message_from_bytes(archive.read(wheel_name))
        (entry_points,) = [archive.read(name).decode() for name in names if name.endswith("entry_points.txt")]
    assert [name for name in names if name.endswith((".so", ".pyd"))] == ["recsys_kernels/_C.so"]
    assert {"recsys_kernels/py.typed", "recsys_kernels/jobs/compress/report.html"} <= set(names)
    assert not [name for name in names if name.startswith(("tests", "bench", "csrc"))]
    for source in PACKAGE.rglob("*.py"):
        assert source.relative_to(PACKAGE.parent).as_posix() in names
    assert tags["Root-Is-Purelib"] == "false"
    assert tags["Tag"].startswith("py3-none-linux_")
    required = metadata.get_all("Requires-Dist") or []
    core = {re.match(r"[\w.-]+", line)[0] for line in required if "extra ==" not in line}  # type: ignore[index]
    assert core == {"torch", "numpy"}
    assert set(metadata.get_all("Provides-Extra") or []) >= {"demo", "triton", "cuda-build", "test", "bench"}
    assert metadata["Version"] == rk.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert "recsys-kernels = recsys_kernels.cli:main" in entry_points


def test_version_is_read_without_torch(tmp_path: Path) -> None:
    """As in pip's isolated builds, which have no torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert checked(sys.executable, "setup.py", "--version", cwd=ROOT, env=environment).split()[-1] == rk.__version__


def build_without(name: str, tmp_path: Path, *command: str | Path, **environment: str) -> str:
    """Runs setup.py where PATH and the interpreter's scripts hold a compiler and ninja, but for the one named."""
    checked(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in {"g++", "ninja"} - {name}:
        (tools / tool).symlink_to(shutil.which(tool) or "/nowhere")
    # setuptools and torch come from here; scripts do not.
    libraries = os.pathsep.join(dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))))
    clean = {key: value for key, value in os.environ.items() if key != "CXX"}
    done = run(
        *(tmp_path / "venv" / "bin" / "python", "setup.py", "-q", "egg_info", "--egg-base", tmp_path),
        *("build", "--build-base", tmp_path / "build", *command),
        cwd=ROOT,
        env={**clean, "PATH": str(tools), "PYTHONPATH": libraries, **environment},
    )
    assert not list((tmp_path / "build").rglob("*.so"))
    return f"exit status {done.returncode}\n{done.stdout}\n{done.stderr}"


def test_what_is_downloaded_is_said(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """pip fetches what a build asks for without a word, and torch is large."""
    script = build_script()
    assert script.build_requirements() == []
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(script, "torch_root", lambda: None)
    assert script.build_requirements() == ["torch==2.13.0"]
    said = capfd.readouterr().err
    assert f"there is no torch in {sysconfig.get_paths()['purelib']}, so pip downloads torch==2.13.0" in said
    assert said.count("\n") == 1
    monkeypatch.setattr(script, "builds_kernels", lambda: False)
    assert script.build_requirements() == []


def test_without_a_compiler_the_build_says_so(tmp_path: Path) -> None:
    wheel_options = ("bdist_wheel", "--dist-dir", tmp_path, "--bdist-dir", tmp_path / "bdist")
    output = build_without("g++", tmp_path, *wheel_options)
    assert output.startswith("exit status 0\n"), output
    said = [line for line in output.splitlines() if "no C++ compiler found" in line]
    assert len(set(said)) == 1
    assert "references will be used" in said[0]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")


def test_compiler_that_was_asked_for_but_does_not_exist_is_an_error(tmp_path: Path) -> None:
    output = build_without("", tmp_path, CXX="ccache-of-mine g++")
    assert output.startswith("exit status 1\n"), output
    assert "recsys_kernels: the C++ compiler that CXX names does not exist: ccache-of-mine g++" in output


def test_without_ninja_the_build_says_what_to_install(tmp_path: Path) -> None:
    output = build_without("ninja", tmp_path)
    assert output.startswith("exit status 1\n"), output
    assert "recsys_kernels: ninja was not found" in output
    assert "pip install ninja" in output
    assert "Traceback" not in output


def test_checkout_may_have_any_name(tmp_path: Path) -> None:
    """Folders' names with what ninja and shells treat in their own ways."""
    root = tmp_path / "it's a $HOME: (of mine)"
    root.mkdir()
    shutil.copytree(PACKAGE, root / "recsys_kernels", ignore=shutil.ignore_patterns("_C.*", "__pycache__"))
    # The kernels of all levels take long to compile, and their paths are like those of the others; test_cuda_build.py
    # does the same with nvcc.
    shutil.copytree(ROOT / "csrc", root / "csrc", ignore=shutil.ignore_patterns("kernel.cpp", "*.cu"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    command = (sys.executable, "setup.py", "build_ext", "--inplace")
    checked(*command, cwd=root)
    assert (root / "recsys_kernels" / "_C.so").exists()
    assert "no work to do" in checked(*command, cwd=root)
    (root / "csrc" / "core" / "isa.h").touch()
    assert "no work to do" not in checked(*command, cwd=root), "ninja did not learn which headers were read"


@pytest.mark.parametrize(
    ("system", "machine", "tag"),
    [("win32", "AMD64", "any"), ("darwin", "arm64", "macosx_11_0_arm64"), ("darwin", "x86_64", "macosx_11_0_x86_64")],
)
def test_wheel_is_named_after_what_is_built(system: str, machine: str, tag: str) -> None:
    script = f"""
import platform, sys
from setuptools.command.bdist_wheel import bdist_wheel
from distutils.core import run_setup
distribution = run_setup("setup.py", stop_after="init")
bdist_wheel.get_tag = lambda self: ("cp312", "cp312", "macosx_11_0_universal2")
sys.platform, platform.machine = {system!r}, lambda: {machine!r}
print(*distribution.get_command_obj("bdist_wheel").get_tag())
"""
    printed = checked(sys.executable, "-c", script, cwd=ROOT, env={**os.environ, "CXX": compiler()})
    assert printed.split() == ["py3", "none", tag]


def test_failing_compiler_is_an_error(tmp_path: Path) -> None:
    wrapper = tmp_path / "broken"
    wrapper.write_text("#!/bin/sh\necho broken compiler >&2\nexit 1\n")
    wrapper.chmod(0o755)
    options = ("--build-temp", tmp_path / "temp", "--build-lib", tmp_path / "lib")
    command = (sys.executable, "setup.py", "-q", "build_ext", *options)
    done = run(*command, cwd=ROOT, env={**os.environ, "CXX": str(wrapper)})
    assert done.returncode != 0
    assert "broken compiler" in done.stdout + done.stderr
    assert "compiling the native kernels failed" in done.stderr
    assert not list(tmp_path.rglob("*.so"))


# ---- memory -------------------------------------------------------------------------------------------------------


def test_kernels_touch_nothing_outside_of_their_tensors() -> None:
    done = run(sys.executable, TESTS / "sanitize" / "guard_pages.py")
    last = done.stderr.splitlines()[-1] if done.stderr else ""
    assert done.returncode == 0, f"exit status {done.returncode} at: {last}\n{done.stderr[-3000:]}"
    assert int(done.stdout) > 5000 * len(isa_levels())


def test_guard_pages_catch_one_row_too_many() -> None:
    done = run(sys.executable, TESTS / "sanitize" / "guard_pages.py", "wrong")
    assert done.stdout.strip().endswith("now one row too many")
    assert done.returncode == -signal.SIGSEGV


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the package whose library is instrumented with AddressSanitizer and UBSan."""
    folder = tmp_path_factory.mktemp("sanitized")
    options = ("--sanitize", "--build-temp", folder / "temp", "--build-lib", folder / "lib")
    checked(sys.executable, "setup.py", "-q", "build_ext", *options, cwd=ROOT)
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    shutil.copytree(PACKAGE, folder / "root" / "recsys_kernels", ignore=ignore)
    shutil.copy(folder / "lib" / "recsys_kernels" / "_C.so", folder / "root" / "recsys_kernels")
    return folder / "root"


def run_sanitized(root: Path, script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs Python with the sanitizers' runtime; fresh memory is filled with NaN and followed by red zones."""
    # libstdc++ as well, or the sanitizer finds no __cxa_throw to wrap.
    preload = [checked(compiler(), f"-print-file-name={name}").strip() for name in ("libasan.so", "libstdc++.so.6")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RECSYS_KERNELS_")}
    environment |= {
        "LD_PRELOAD": " ".join(preload),
        # What Python and torch leave behind at the end is not ours.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1073741824:malloc_fill_byte=255",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(root),
    }
    return run(sys.executable, "-c", script, *arguments, cwd=root, env=environment)


_PYTEST = """
import sys
import torch
assert torch.empty(4).isnan().all() and torch.empty(4, dtype=torch.float16).isnan().all(), "memory is not poisoned"
from recsys_kernels.backends.registry import native
assert native.path is not None and str(native.path).startswith(sys.argv[1]), native.path
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""

# What runs every kernel at every level. Both layouts of quantized tables are read at guard pages already.
_SANITIZED_TESTS = (
    "ops/embedding_bag/test_fuzz.py",
    "ops/embedding_bag/test_embedding_bag.py::test_forward",
    "ops/embedding_bag/test_embedding_bag.py::test_gradients",
    "ops/embedding_bag/test_embedding_bag.py::test_results_do_not_depend_on_threads",
    "ops/embedding_bag/test_embedding_bag.py::test_no_bags_but_indices",
    "ops/embedding_bag/test_embedding_bag.py::test_tables_without_rows_or_columns",
    "ops/embedding_bag/test_embedding_bag.py::test_max_of_equal_values_takes_the_first",
    "ops/embedding_bag/test_quantized.py::test_every_level_gives_the_same_bits",
    "ops/embedding_bag/test_quantized.py::test_lookup_is_that_of_the_dequantized_table",
    "ops/embedding_bag/test_quantized.py::test_operators_check_their_arguments",
    "ops/embedding_bag/test_quantized.py::test_gradient_of_per_sample_weights",
    "ops/embedding_bag/test_quantized.py::test_nan_and_infinity_are_refused_by_row",
    "ops/embedding_bag/test_collection.py::test_forward",
    "ops/embedding_bag/test_collection.py::test_gradients",
    "ops/embedding_bag/test_collection.py::test_mapping_and_jagged_input",
    "ops/embedding_bag/test_collection.py::test_operator_checks_the_plan",
    "ops/linear/int8/test_int8_linear.py::test_every_sample_against_numpy",
    "ops/linear/int8/test_int8_linear.py::test_nan_and_infinity_make_their_row_nan",
    "ops/linear/int8/test_int8_linear.py::test_integers_are_exact_at_every_size",
    "ops/linear/int8/test_int8_chain.py::test_chains",
    "ops/linear/int8/test_int8_chain.py::test_layout",
    "ops/linear/int8/test_int8_chain.py::test_random_bytes_are_refused_or_read_within_their_bounds",
    "ops/linear/sparse/test_sparse_linear.py::test_every_sample_against_numpy",
    "ops/linear/sparse/test_sparse_linear.py::test_gradients_against_a_masked_dense_layer",
    "ops/linear/sparse/test_sparse_linear.py::test_gradient_of_infinite_rows_stays_at_its_places",
    "ops/linear/sparse/test_sparse_training.py::test_new_values_in_a_packed_layer",
    "ops/linear/sparse/test_sparse_packs.py",
)


def test_kernels_under_address_and_undefined_behaviour_sanitizer(sanitized: Path) -> None:
    done = run_sanitized(
        sanitized,
        _PYTEST,
        sanitized,
        *("-q", "-s", "-c", ROOT / "pyproject.toml", "--rootdir", ROOT, "-o", "addopts=", "--tb=short"),
        *("-p", "no:cacheprovider"),
        *("--hypothesis-profile=sanitize", "-k", "not reference and not scales-apart"),
        *(TESTS / name for name in _SANITIZED_TESTS),
    )
    output = f"{done.stdout[-4000:]}\n{done.stderr[:4000]}"  # the sanitizer says first what is wrong
    assert done.returncode == 0, output
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None, output
    assert int(passed[1]) > 30 * len(isa_levels()), output
    assert " skipped" not in done.stdout, output
    assert "runtime error" not in output


def places_of_definitions(objects: list[Path]) -> dict[str, set[str]]:
    """Where the sources define each ``rk::`` symbol that objects share, by the debugging information in them.

    Of several definitions of one symbol the linker keeps any. They have to be one: in one line of one header.
    """
    found: dict[str, set[str]] = {}
    for path in objects:
        for line in checked("nm", "-l", path).splitlines():
            symbol, _, place = line.partition("\t")
            kind, name = symbol.split()[-2:]
            if kind in "WVu" and re.match(r"_ZN?K?2rk", name) and place:
                file, _, number = place.rpartition(":")
                found.setdefault(name, set()).add(f"{os.path.normpath(file)}:{number}")
    return found


def test_shared_symbols_have_one_definition(sanitized: Path) -> None:
    """Functions of the same name and arguments that do or return different things would replace each other."""
    require_emulation()
    # Both keep the functions that the optimizer would take into their callers; the emulation has the .cu files.
    folder = compiled("checked", cache_folder("checked", "kernels"), kernel_sources())
    objects = [path for path in folder.glob("*.o") if not path.name.startswith("emulator")]
    objects += sanitized.parent.glob("temp/**/*.o")
    found = places_of_definitions(objects)
    assert {len(objects) > 15, len(found) > 50} == {True}
    assert any("core/device.h" in place for places in found.values() for place in places)
    assert {name: places for name, places in found.items() if len(places) > 1} == {}


def test_two_definitions_of_a_symbol_are_seen(tmp_path: Path) -> None:
    """As two headers once did: the same name and arguments, other results."""
    text = "namespace rk {{ inline {0} of(int x) {{ return x; }} {0} use_{0}(int x) {{ return of(x); }} }}\n"
    objects = []
    for number, kind in enumerate(("int", "long")):
        (tmp_path / f"{kind}.cpp").write_text("\n" * number + text.format(kind))
        objects.append(tmp_path / f"{kind}.o")
        checked(compiler(), "-g1", "-O0", "-c", tmp_path / f"{kind}.cpp", "-o", objects[-1])
    assert places_of_definitions(objects) == {"_ZN2rk2ofEi": {f"{tmp_path}/int.cpp:1", f"{tmp_path}/long.cpp:2"}}


def test_sanitizer_catches_a_kernel_that_reads_too_far(sanitized: Path) -> None:
    """A table that says it has one row more than its memory: the instrumented kernel is stopped at the last one."""
    script = """
import ctypes, torch
import recsys_kernels as rk
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = libc.malloc(ctypes.c_size_t(3 * 20 * 4))
table = torch.frombuffer((ctypes.c_float * (4 * 20)).from_address(memory), dtype=torch.float32).reshape(4, 20)
torch.ops.recsys_kernels.embedding_bag(table, torch.tensor([[2, 0]]), None, None, 0, -1, False)
print("so far all is well", flush=True)
torch.ops.recsys_kernels.embedding_bag(table, torch.tensor([[2, 3]]), None, None, 0, -1, False)
"""
    done = run_sanitized(sanitized, script)
    assert done.stdout.strip() == "so far all is well"
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("past_the_end(5)", "heap-buffer-overflow"),
        ("overflow(2)", "signed integer overflow"),
        ("misaligned(b'12345678')", "misaligned address"),
    ],
)
def test_sanitizers_catch_what_they_should(sanitized: Path, tmp_path: Path, call: str, message: str) -> None:
    """The flags of the instrumented build, as its build.ninja has them, on code that is wrong on purpose."""
    text = next(sanitized.parent.glob("temp/**/build.ninja")).read_text()
    flags = sorted(set(re.findall(r"-f(?:no-)?sanitize\S+", text)))
    assert "-fsanitize=address,undefined" in flags
    library = tmp_path / "wrong.so"
    checked(compiler(), "-shared", "-fPIC", "-std=c++17", *flags, TESTS / "sanitize" / "wrong.cpp", "-o", library)
    done = run_sanitized(sanitized, f"import ctypes\nctypes.CDLL({str(library)!r}).{call}\nprint('survived')")
    assert done.returncode != 0
    assert message in done.stderr
    assert "survived" not in done.stdout
