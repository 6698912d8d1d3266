"""Builds the native library: one small build.ninja, every kernel compiled once per instruction-set level.

Where a CUDA toolkit is found, its compiler adds the kernels for NVIDIA GPUs to the same library, which then still loads
beside a torch without CUDA: the runtime is linked statically, and no GPU or driver is asked for at build time.

torch's own extension helpers are not used: they need a GPU toolkit that matches torch, bind the library to one
torch release, and know nothing of several instruction-set levels in one library.
"""

import importlib.util
import logging
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

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

# Lowest first; the position is the level's number in csrc/core/isa.h.
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512", *AVX512_WARNINGS]
X86_LEVELS = {
    "generic": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
}

# The machine code in the library, by the PTX that it is made of: making PTX takes three times as long as making machine
# code of it. sm_90 is what the kernels are tuned for. A GPU runs the code of its own generation (12.0 also serves 12.1,
# 10.0 also 10.3), and newer ones compile the newest PTX when the library is first used. A toolkit that is too old for
# some of them builds the others.
GPU_CODE = {90: (90, 100, 120), 75: (75,), 80: (80, 86, 89)}
GPU_ARCHITECTURES = tuple(number for numbers in GPU_CODE.values() for number in numbers)
TOOLKIT_FOLDERS = (Path("/usr/local/cuda"), Path("/opt/cuda"))


class Toolkit(NamedTuple):
    """A CUDA toolkit: its compiler, release, the folder with the static runtime, and what it can build of the above."""

    nvcc: Path
    release: tuple[int, int]
    runtime: Path
    architectures: tuple[int, ...]


def said_by(command: list[str]) -> str:
    """The output of a program, or nothing when it can't be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def toolkit_at(root: Path) -> Toolkit | None:
    """The toolkit in a folder if it has what the build needs; a folder can hold a runtime and no compiler."""
    nvcc = root / "bin" / "nvcc"
    places = [*root.glob("lib*"), *root.glob("targets/*/lib"), *Path("/usr/lib").glob("*-linux-gnu")]
    runtime = next((place for place in places if (place / "libcudart_static.a").is_file()), None)
    release = re.search(r"release (\d+)\.(\d+)", said_by([str(nvcc), "--version"]))
    if runtime is None or release is None:
        return None
    known = re.findall(r"sm_(\d+)\b", said_by([str(nvcc), "--list-gpu-code"]))
    buildable = tuple(number for number in GPU_ARCHITECTURES if str(number) in known)
    return Toolkit(nvcc, (int(release[1]), int(release[2])), runtime, buildable) if buildable else None


def toolkit_roots() -> Iterator[Path]:
    """Yields folders that may hold a toolkit: pip's packages in the target environment, the PATH, the usual folders."""
    for folder in dict.fromkeys([sysconfig.get_paths()["purelib"], *sys.path]):
        yield from sorted(Path(folder).glob("nvidia/cu1[0-9]"), reverse=True)
    on_path = shutil.which("nvcc")
    if on_path:
        # The file can be a script that calls the real nvcc elsewhere. Its dry run names the toolkit's root.
        plan = subprocess.run([on_path, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
        top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
        if top:
            yield Path(top[1]).resolve()
    yield from TOOLKIT_FOLDERS


def cuda_toolkit() -> Toolkit | None:
    """The CUDA toolkit to build with, or None. One that CUDA_HOME names has to be there."""
    asked_for = os.environ.get("CUDA_HOME", "").strip()
    if not asked_for:
        return next(filter(None, map(toolkit_at, toolkit_roots())), None)
    found = toolkit_at(Path(asked_for))
    if found is None:
        sys.exit(f"recsys_kernels: CUDA_HOME names no CUDA toolkit with nvcc and a static runtime: {asked_for}")
    return found


def kept_ptx(architectures: tuple[int, ...]) -> int:
    """Which PTX the library keeps for GPUs that are newer than its code: the newest that is built."""
    return max(ptx for ptx, numbers in GPU_CODE.items() if set(numbers) & set(architectures))


def nvcc_flags(architectures: tuple[int, ...]) -> list[str]:
    """The options with which every .cu file is compiled, except for the folders of headers."""
    code = []
    for ptx, numbers in GPU_CODE.items():
        targets = [f"sm_{number}" for number in numbers if number in architectures]
        if targets:
            targets += [f"compute_{ptx}"] if ptx == kept_ptx(architectures) else []
            code.append(f"-gencode=arch=compute_{ptx},code=[{','.join(targets)}]")
    return ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Werror=return-type", *DEFINES, *code]


def host_compiler(cxx: str) -> str:
    """The compiler in a command like "ccache g++ -m64", which nvcc takes only as the path of a program."""
    words = shlex.split(cxx)
    return words[1] if len(words) > 1 and Path(words[0]).name in ("ccache", "sccache", "distcc") else words[0]


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


def ninja_file(cxx: str, torch_dir: Path, target: Path, extra: list[str], cuda: Toolkit | None) -> str:
    """The text of build.ninja: kernel.cpp once per level, everything else once, one shared library."""
    lib = torch_dir / "lib"
    if sys.platform == "darwin":
        link = "-dynamiclib -undefined dynamic_lookup"
    else:
        # Both of torch's libraries are linked, used or not: they lead the loader to a weak symbol of a CUDA torch.
        link = f"-shared {ninja_argument(f'-L{lib}')} -Wl,--no-as-needed -ltorch -ltorch_cpu -Wl,--exclude-libs,ALL"
    includes = " ".join([ninja_argument(f"-I{ROOT / 'csrc'}"), "-isystem", ninja_argument(str(torch_dir / "include"))])
    common = [f"-DRK_HIGHEST_ISA={len(levels()) - 1}"]
    if cuda is not None:
        # The runtime asks the loader for its thread-local storage; the system's libraries are needed where it is used.
        link += f" {ninja_argument(str(cuda.runtime / 'libcudart_static.a'))} -Wl,--as-needed -lpthread -ldl -lrt"
        built_for = "_".join(map(str, sorted(cuda.architectures)))
        common += [
            f"-DRK_CUDA_RELEASE={cuda.release[0]}{cuda.release[1]:02}",
            f"-DRK_CUDA_ARCHITECTURES={built_for}",
            f"-DRK_CUDA_PTX={kept_ptx(cuda.architectures)}",
        ]
    flags = " ".join([*COMMON_FLAGS, *DEFINES, *common, includes, *extra])
    command = cxx.replace("$", "$$")
    lines = [
        "ninja_required_version = 1.5",
        "rule cxx",
        f"  command = {command} -MMD -MF $out.d {flags} $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {command} {' '.join(extra)} $in {link} -o $out",
    ]
    if cuda is not None:
        nvcc, host = ninja_argument(str(cuda.nvcc)), ninja_argument(f"-ccbin={host_compiler(cxx)}")
        # Each kind of PTX and each architecture is a compilation of its own, so that a file is worth several threads.
        code = map(ninja_argument, nvcc_flags(cuda.architectures))
        options = " ".join([host, *code, "-Icsrc", "-isystem torch"])
        lines += [
            "rule nvcc",
            f"  command = {nvcc} --threads {os.cpu_count() or 1} -MMD -MF $out.d {options} -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
        ]
    lines.append("")
    objects = []

    def add(source: Path, suffix: str = "", flags: str = "") -> None:
        path = source.relative_to(ROOT / "csrc").as_posix()
        out = f"{path.rpartition('.')[0].replace('/', '_')}{suffix}.o"
        if source.suffix == ".cu":
            lines.append(f"build {out}: nvcc csrc/{path}")
        else:
            lines.extend([f"build {out}: cxx {ninja_path(source)}", f"  flags = {flags}"])
        objects.append(out)

    # The sources that take longest come first.
    for source in sorted((ROOT / "csrc").rglob("*.cu")) if cuda else ():
        add(source)
    for source in sorted((ROOT / "csrc").rglob("*.cpp")):
        if source.stem == "kernel":
            for name, isa_flags in levels().items():
                add(source, f"_{name}", " ".join([f"-DRK_ISA={name}", *KERNEL_FLAGS, *isa_flags]))
        else:
            add(source)
    lines.extend([f"build {ninja_path(target)}: link {' '.join(objects)}", ""])
    return "\n".join(lines)


def link_folders(work: Path, torch_dir: Path) -> None:
    """Names nvcc's folders plainly: it hands its arguments to a shell, where the name of a folder can mean more."""
    for name, folder in (("csrc", ROOT / "csrc"), ("torch", torch_dir / "include")):
        link = work / name
        if link.is_symlink():
            link.unlink()
        link.symlink_to(folder, target_is_directory=True)


class BuildNative(build_ext):
    """build_ext through ninja. Without a compiler the package is built without the library and says so."""

    user_options: ClassVar = [
        *build_ext.user_options,
        ("sanitize", None, "build with AddressSanitizer and UBSan, for the CPU only"),
        ("without-cuda", None, "leave the CUDA kernels out, though there is a toolkit"),
    ]
    boolean_options: ClassVar = [*build_ext.boolean_options, "sanitize", "without-cuda"]

    def initialize_options(self) -> None:
        super().initialize_options()
        self.sanitize = False
        self.without_cuda = False

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
        # With optimization the instrumented kernels take 95 s to compile instead of 15.
        sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-Og", "-g1"]
        extra = sanitizers if self.sanitize else []
        cuda = self.toolkit()
        if cuda is not None:
            link_folders(work, torch_dir)
        (work / "build.ninja").write_text(ninja_file(cxx, torch_dir, target, extra, cuda))
        self.announce(
            f"recsys_kernels: compiling for {' '.join(levels())} with torch's headers in {torch_dir}", logging.INFO
        )
        if subprocess.run([ninja, "-C", str(work)]).returncode:
            sys.exit("recsys_kernels: compiling the native kernels failed; the compiler's message is above")

    def toolkit(self) -> Toolkit | None:
        """The CUDA toolkit of this build; says in one line what that means for CUDA tensors."""
        if self.sanitize or self.without_cuda or sys.platform != "linux":
            return None
        found = cuda_toolkit()
        if found is None:
            self.warn("recsys_kernels: no CUDA toolkit with nvcc found; building the CPU kernels (GPUs: Triton)")
        else:
            targets = " ".join(f"sm_{number}" for number in sorted(found.architectures))
            release = ".".join(map(str, found.release))
            self.announce(
                f"recsys_kernels: CUDA kernels by nvcc {release} ({found.nvcc}) for {targets}", level=logging.INFO
            )
        return found

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


def files(*suffixes: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.suffix in suffixes)


def build_requirements() -> list[str]:
    """The packages that pip must download before it can build. Prints them, since pip shows them only with ``-v``."""
    if not builds_kernels() or torch_root() is not None:
        return []
    print(
        f"recsys_kernels: there is no torch in {sysconfig.get_paths()['purelib']}, so pip downloads "
        f"{TORCH_REQUIREMENT} for its headers, often a build of several GB. Install torch first to avoid that (its "
        "build for CPUs is far smaller).",
        file=sys.stderr,
        flush=True,
    )
    return [TORCH_REQUIREMENT]


def main() -> None:
    setup(
        # The sources are named for the sdist; BuildNative compiles them in its own way.
        ext_modules=[Extension("recsys_kernels._C", sources=files(".cpp", ".cu"), depends=files(".h", ".cuh"))],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
        # The build asks for torch only when the target environment has none.
        setup_requires=build_requirements(),
    )


if __name__ == "__main__":  # the tests import this file to test its functions
    main()
