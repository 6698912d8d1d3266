"""Builds the native library: one small build.ninja, every kernel compiled once per instruction-set level.

torch's own extension helpers are not used: they need a GPU toolkit that matches torch, bind the library to one
torch release, and know nothing of several instruction-set levels in one library.
"""

import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH_REQUIREMENT = "torch==2.13.0"

# The stable ABI of torch 2.10: one binary for torch 2.10 and newer.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]
COMMON_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror=return-type"]
# Kernels must not let the compiler fuse a*b+c: quantization has to give the same bits on every level.
KERNEL_FLAGS = ["-fno-exceptions", "-fno-rtti", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]

# gcc 12 sees uninitialized values inside its own AVX-512 intrinsics (GCC bug 105593).
AVX512_WARNINGS = ["-Wno-maybe-uninitialized", "-Wno-uninitialized"]

# Lowest first; the position is the level's number in csrc/common/isa.h.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512", *AVX512_WARNINGS]
X86_LEVELS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
}


def torch_root() -> Path | None:
    """The folder of an installed torch, found without importing it.

    pip's isolated builds run the target environment's interpreter, so its purelib is still visible there.
    """
    installed = Path(sysconfig.get_paths()["purelib"]) / "torch"
    if (installed / "include" / "torch" / "csrc" / "stable").is_dir():
        return installed
    spec = importlib.util.find_spec("torch")
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def compiler() -> str | None:
    """The C++ compiler that CXX names, whether it exists or not; else the first one on the PATH, or None."""
    return os.environ.get("CXX", "").strip() or next(filter(shutil.which, ["g++", "c++", "clang++"]), None)


def builds_kernels() -> bool:
    return sys.platform != "win32" and compiler() is not None


def levels() -> dict[str, list[str]]:
    return X86_LEVELS if platform.machine().lower() in ("x86_64", "amd64") else {"generic": []}


def ninja_path(path: Path) -> str:
    """A path in a build statement of ninja."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def ninja_argument(argument: str) -> str:
    """One argument of a command, which ninja hands to a shell."""
    return shlex.quote(argument).replace("$", "$$")


def ninja_file(cxx: str, torch_dir: Path, target: Path, extra: list[str]) -> str:
    """The text of build.ninja: kernel.cpp once per level, everything else once, one shared library."""
    lib = torch_dir / "lib"
    if sys.platform == "darwin":
        link = "-dynamiclib -undefined dynamic_lookup"
    else:
        link = f"-shared {ninja_argument(f'-L{lib}')} -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--exclude-libs,ALL"
    includes = [ninja_argument(f"-I{ROOT / 'csrc'}"), "-isystem", ninja_argument(str(torch_dir / "include"))]
    cxx = cxx.replace("$", "$$")
    highest = f"-DRK_HIGHEST_ISA={len(levels()) - 1}"
    flags = " ".join([*COMMON_FLAGS, *DEFINES, highest, *includes, *extra])
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {cxx} -MMD -MF $out.d {flags} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {cxx} {' '.join(extra)} $in {link} -o $out",
        "",
    ]
    objects = []

    def add(source: Path, suffix: str = "", flags: str = "") -> None:
        out = f"{source.relative_to(ROOT / 'csrc').with_suffix('').as_posix().replace('/', '_')}{suffix}.o"
        lines.extend([f"build {out}: cxx {ninja_path(source)}", f"  flags = {flags}"])
        objects.append(out)

    for source in sorted((ROOT / "csrc").glob("*/*.cpp")):
        if source.stem == "kernel":
            for name, isa_flags in levels().items():
                add(source, f"_{name}", " ".join([f"-DRK_ISA={name}", *KERNEL_FLAGS, *isa_flags]))
        else:
            add(source)
    lines.extend([f"build {ninja_path(target)}: link {' '.join(objects)}", ""])
    return "\n".join(lines)


class BuildNative(build_ext):
    """build_ext through ninja. Without a compiler the package is built without the library and says so."""

    user_options: ClassVar = [*build_ext.user_options, ("sanitize", None, "build with AddressSanitizer and UBSan")]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False

    def get_ext_filename(self, fullname: str) -> str:
        # The library holds no Python symbol, so its name carries no Python version.
        suffix = ".dylib" if sys.platform == "darwin" else ".so"
        return os.path.join(*fullname.split(".")) + suffix

    def build_extension(self, ext: Extension) -> None:
        cxx = compiler()
        if cxx is None or not builds_kernels():
            windows = sys.platform == "win32"
            reason = "native kernels are not built on Windows" if windows else "no C++ compiler found"
            self.warn(f"recsys_kernels: {reason}; installing without native kernels (references will be used)")
            return
        # A command can have several words: "ccache g++".
        if not shutil.which(shlex.split(cxx)[0]):
            sys.exit(f"recsys_kernels: the C++ compiler that CXX names does not exist: {cxx}")
        ninja = shutil.which("ninja") or shutil.which("ninja", path=sysconfig.get_path("scripts"))
        if ninja is None:
            sys.exit("recsys_kernels: ninja was not found, which runs the compiler; run `pip install ninja` first")
        torch_dir = torch_root()
        if torch_dir is None:
            sys.exit(f"recsys_kernels: torch's headers were not found; run `pip install {TORCH_REQUIREMENT}` first")
        version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch_dir / "version.py").read_text())
        if version and (int(version[1]), int(version[2])) < (2, 10):
            sys.exit(f"recsys_kernels: torch {version[1]}.{version[2]} is too old, 2.10 or newer is needed")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(self.build_temp).resolve() / ("sanitize" if self.sanitize else "native")
        work.mkdir(parents=True, exist_ok=True)
        # Optimized, the instrumented kernels take 95 s to compile instead of 15.
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Og", "-g1"]
        extra = sanitizers if self.sanitize else []
        (work / "build.ninja").write_text(ninja_file(cxx, torch_dir, target, extra))
        if subprocess.run([ninja, "-C", str(work)]).returncode:
            sys.exit("recsys_kernels: compiling the native kernels failed; the compiler's message is above")

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if built.exists():
                # Renamed into place: writing over a library that a running process has mapped would crash it.
                target = ROOT / self.get_ext_filename(ext.name)
                fresh = target.with_suffix(".new")
                shutil.copy2(built, fresh)
                fresh.replace(target)


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3: `py3-none-<platform>`, or `py3-none-any` when nothing was compiled."""

    def get_tag(self) -> tuple[str, str, str]:
        if not builds_kernels():
            return "py3", "none", "any"
        # A Python for both kinds of Macs does not make the compiler build for both.
        return "py3", "none", super().get_tag()[2].replace("universal2", platform.machine())


setup(
    # The sources are named for the sdist; BuildNative compiles them in its own way.
    ext_modules=[
        Extension(
            "recsys_kernels._C",
            sources=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*/*.h")),
        )
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    # Only asked for when the target environment has no torch; brings one into the build.
    setup_requires=[TORCH_REQUIREMENT] if builds_kernels() and torch_root() is None else [],
)
