"""Operators and families of operators, and the native library whose kernels serve them.

A family is a folder of ``ops/``. Its ``spec.py`` declares each operator by an operand table: a ``NamedTuple`` whose
annotations are the types of the operands, in order. A field whose type is another operand table stands for the fields
of that table. From an operand table follow

- the schema by which torch knows the operator (``torch.ops.recsys_kernels.*``),
- the operands as a value, with names, which the shape function and the implementations take,
- the flat arguments that torch's dispatcher takes, and back.

An operator exists, with the right answer, on any machine: its reference is plain PyTorch. Native kernels take over when
the library loads, and Triton's where ``selection`` says so. ``doctor``, the tests, ``optimize`` and the benchmarks ask
:func:`families` what there is, so that a new family is one folder and one line in ``ops/__init__.py``.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch

NAMESPACE = "recsys_kernels"
LIBRARIES = ("_C.so", "_C.dylib")
ISA_LEVELS = ("generic", "avx2", "avx512", "avx512_vnni")
BOUNDS_CHECKS = ("raise", "clamp", "ignore")

# Must live as long as the process: torch drops the operators when the object dies.
library = torch.library.Library(NAMESPACE, "DEF")

# Types of operands that Python has no type for: a number that may be symbolic while a graph is traced, and a tensor
# that the operator writes to.
SymInt = Annotated[int, "SymInt"]
Written = Annotated[torch.Tensor, "written"]

_SCHEMA_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    int: "int",
    SymInt: "SymInt",
    bool: "bool",
    float: "float",
    torch.dtype: "ScalarType",
    list[torch.Tensor]: "Tensor[]",
    list[torch.Tensor | None]: "Tensor?[]",
    list[int]: "int[]",
}


# ---- operand tables -------------------------------------------------------------------------------------------------


def _is_table(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, tuple) and hasattr(annotation, "_fields")


def operand_types(table: type[NamedTuple]) -> list[tuple[str, Any]]:
    """Name and type of every operand of a table; the operands of a nested table stand in its place."""
    found: list[tuple[str, Any]] = []
    for name, annotation in typing.get_type_hints(table, include_extras=True).items():
        found += operand_types(annotation) if _is_table(annotation) else [(name, annotation)]
    return found


def schema_of(name: str, table: type[NamedTuple], returns: str) -> str:
    """The schema of an operator, as ``torch.library.Library.define`` takes it.

    Raises:
        TypeError: an operand has a type that no schema has.
    """
    parts, letters = [], iter("abcdefgh")
    for operand, annotation in operand_types(table):
        kind = f"Tensor({next(letters)}!)" if annotation == Written else _SCHEMA_TYPES.get(annotation)
        if kind is None:
            raise TypeError(f"{name}: operand {operand} has the type {annotation}, which no schema has")
        parts.append(f"{kind} {operand}")
    return f"{name}({', '.join(parts)}) -> {returns}"


@cache
def _layout(table: type[NamedTuple]) -> tuple[tuple[type[NamedTuple] | None, int], ...]:
    """Returns for every field of a table the nested table or None, and how many flat arguments the field stands for."""
    hints = typing.get_type_hints(table, include_extras=True).values()
    return tuple((hint, len(operand_types(hint))) if _is_table(hint) else (None, 1) for hint in hints)


def flat(operands: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments that the dispatcher takes for the fields of an operand table, in order."""
    out: list[Any] = []
    for value in operands:
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            out += flat(value)
        else:
            out.append(value)
    return tuple(out)


def _check_devices(names: tuple[str, ...], args: tuple[Any, ...]) -> None:
    """Raises if the tensors of a call are on several devices.

    torch lets the meta device decide such a call, and a shape function would then hand out memory that nobody filled.
    """
    first: tuple[str, torch.Tensor] | None = None
    for name, arg in zip(names, args, strict=True):
        for tensor in arg if isinstance(arg, (list, tuple)) else (arg,):
            if not isinstance(tensor, torch.Tensor):
                continue
            first = first or (name, tensor)
            if tensor.device == first[1].device:
                continue
            if tensor.is_meta or first[1].is_meta:
                meta, other = (name, first) if tensor.is_meta else (first[0], (name, tensor))
                raise RuntimeError(
                    f"{meta} is on the meta device, which holds no values, but {other[0]} is on {other[1].device}"
                )
            raise RuntimeError(
                f"{name} must be on {first[1].device} like the other arguments, but is on {tensor.device}"
            )


# ---- operators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operator:
    """One operator of a family.

    Attributes:
        name: as torch knows it.
        operands: its operand table.
        returns: what it returns, in a schema's words.
        package: the package of its family, whose module ``reference`` holds a function of the operator's name.
        has_triton: whether the module ``triton`` of that package holds one, too.
    """

    name: str
    operands: type[NamedTuple]
    returns: str
    package: str
    has_triton: bool

    @cached_property
    def schema(self) -> str:
        """The schema, as ``torch.library.Library.define`` takes it."""
        return schema_of(self.name, self.operands, self.returns)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The names of the flat arguments."""
        return tuple(name for name, _ in operand_types(self.operands))

    @cached_property
    def dispatched(self) -> Callable[..., Any]:
        """torch's operator: the dispatcher picks the implementation. Takes the flat arguments."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default

    @cached_property
    def reference(self) -> Callable[..., Any]:
        """The implementation in plain PyTorch, on the flat arguments."""
        run = self._adapted("reference")

        def checked(*args: Any) -> Any:
            _check_devices(self.names, args)
            return run(*args)

        return checked

    @cached_property
    def triton(self) -> Callable[..., Any]:
        """The implementation on Triton kernels, on the flat arguments. Importing Triton takes longer than torch's."""
        return self._adapted("triton")

    def _adapted(self, module: str) -> Callable[..., Any]:
        function = getattr(import_module(f"{self.package}.{module}"), self.name)
        return self.adapt(function)

    def adapt(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the fields of the operand table as one of the flat arguments."""
        if not any(table for table, _ in _layout(self.operands)):
            return function

        def run(*args: Any) -> Any:
            return function(*self.unflat(args))

        run.__name__ = run.__qualname__ = self.name
        return run

    def implement(self, key: str, function: Callable[..., Any]) -> None:
        """Registers an implementation with the dispatcher, for a dispatch key as "CPU"."""
        library.impl(self.name, self.adapt(function), key)
        if key == "CPU":
            with_cpu_kernel.add(self.name)

    def unflat(self, args: tuple[Any, ...]) -> Any:
        """Flat arguments as a value of the operand table."""
        return unflat(self.operands, args)


def unflat(table: type[NamedTuple], args: tuple[Any, ...]) -> Any:
    """Flat arguments as a value of an operand table.

    Raises:
        TypeError: another number of arguments than the table has operands.
    """
    layout = _layout(table)
    if sum(count for _, count in layout) != len(args):
        raise TypeError(f"{table.__name__} has {sum(count for _, count in layout)} operands, not {len(args)}")
    fields, at = [], 0
    for nested, count in layout:
        fields.append(args[at] if nested is None else unflat(nested, args[at : at + count]))
        at += count
    return table(*fields)


class ModuleSample(NamedTuple):
    """A module as users make it, and calls of it.

    Attributes:
        name: says the class and the kind.
        make: makes the module, with random weights.
        inputs: from a number of rows, or of indices, 7 or more, to the arguments of a call. Only the length of the
            first argument depends on the number.
    """

    name: str
    make: Callable[[], torch.nn.Module]
    inputs: Callable[[int], tuple[Any, ...]]


class Facts(NamedTuple):
    """The lines and values that a family adds to ``doctor``.

    Attributes:
        values: entries of the dict that ``doctor`` returns.
        heading: label and text of lines about the machine.
        notes: lines under the table of operators.
    """

    values: Mapping[str, Any]
    heading: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of operators, with what other parts of the package need to know of it.

    Other modules are named, not imported, so that importing the package stays cheap. A name is relative to ``package``
    if it starts with a dot, and ends with ``:`` and the attribute where one object is meant.

    Attributes:
        name: for people.
        package: the package of the family, ``__package__`` of its ``spec.py``.
        shown: operators that a user knows of, each with its parts (itself, backward and so on), for ``doctor``.
        modules: the ``torch.nn.Module`` classes that users make, as ``".layer:Int8Linear"``.
        samples: a function without arguments that gives pairs of an operator's name and flat arguments: calls that
            opcheck and the conformance tests make.
        module_samples: a function without arguments that gives a :class:`ModuleSample` of every module, in each of its
            kinds: what the conformance tests run.
        facts: a function without arguments that gives :class:`Facts`.
        converters: modules that register how ``optimize`` replaces layers by those of this family.
        operators: by name; :meth:`define` adds to it.
    """

    name: str
    package: str
    shown: Mapping[str, tuple[str, ...]]
    modules: tuple[str, ...] = ()
    samples: str | None = None
    module_samples: str | None = None
    facts: str | None = None
    converters: tuple[str, ...] = ()
    operators: dict[str, Operator] = field(default_factory=dict)

    def resolve(self, name: str) -> Any:
        """Imports the object that one of the names above stands for."""
        module, _, attribute = name.partition(":")
        found = import_module(module, self.package)
        return getattr(found, attribute) if attribute else found

    def define(
        self,
        name: str,
        operands: type[NamedTuple],
        shape: Callable[[Any], Any],
        *,
        returns: str = "Tensor",
        triton: bool = False,
    ) -> Operator:
        """Defines an operator, with its reference for any device.

        Args:
            name: of the operator, and of its functions in the modules ``reference`` and ``triton`` of the family.
            operands: its operand table.
            shape: from a value of that table to an empty tensor of the result's shape and type ("fake kernel").
            returns: what it returns, in a schema's words.
            triton: whether the module ``triton`` has an implementation.
        """
        operator = Operator(name, operands, returns, self.package, triton)

        def reference(*args: Any) -> Any:
            return operator.reference(*args)

        def fake(*args: Any) -> Any:
            _check_devices(operator.names, args)
            return shape(operator.unflat(args))

        library.define(operator.schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
        operators[name] = self.operators[name] = operator
        dispatched[name] = operator.dispatched
        return operator


operators: dict[str, Operator] = {}
# Operators with a CPU implementation of their own; the native library's are added once it has loaded. A set, as
# asking torch would end a trace of torch.compile.
with_cpu_kernel: set[str] = set()
# The dispatcher's entries, which a call of a module looks up.
dispatched: dict[str, Callable[..., Any]] = {}
_families: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Makes a family known.

    Raises:
        ValueError: another family has that name.
    """
    if family.name in _families:
        raise ValueError(f"there is a family {family.name!r} already")
    _families[family.name] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, in the order in which they were registered."""
    return tuple(_families.values())


def operator_samples() -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Calls of every operator, from the samples of all families: names and flat arguments."""
    for family in families():
        if family.samples is not None:
            yield from family.resolve(family.samples)()


# ---- the native library ---------------------------------------------------------------------------------------------


def _truncated(path: Path) -> bool:
    """Whether a 64-bit ELF file ends before its section headers, which linkers put last.

    The loader maps such a file without complaint, and the process dies of SIGBUS where the pages are missing.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or not header.startswith(b"\x7fELF\x02\x01"):
        return False  # the file is no such ELF file: the loader says what is wrong with it
    (offset,) = struct.unpack_from("<q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return bool(offset + size * count > path.stat().st_size)


def _why_not_built(here: Path) -> str:
    """Why no library lies beside this copy of the package, and what to do about that.

    Args:
        here: the folder of this copy.
    """
    if not (here.parent / "setup.py").is_file():
        return "not built (no C++ compiler when recsys_kernels was installed, or a platform without native kernels)"
    reason = f"this is the source checkout {here.parent}, in which no library is built"
    for folder in map(Path, sys.path):
        other = (folder / here.name).resolve()
        if other != here.resolve() and any((other / name).exists() for name in LIBRARIES):
            return f"{reason}; the installed copy {other} has one: start Python in another folder to use it"
    return f"{reason}; `pip install -e .` there builds it"


def driver_release() -> tuple[int, int] | None:
    """The newest CUDA release that this machine's GPU driver serves, or None without a driver. It wakes no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    if driver.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return version.value // 1000, version.value % 1000 // 10


class NativeLibrary:
    """The shared library with the CPU kernels and, if they were built, the CUDA ones; or the reason why there is none.

    Attributes:
        path: where it lies, or None.
        reason: why it could not be loaded, or None when it was.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        self.reason: str | None = None
        self._functions: ctypes.CDLL | None = None

    def load(self) -> None:
        """Loads the library once; its kernels register with torch as it loads."""
        here = Path(__file__).parent.parent
        found = [here / name for name in LIBRARIES if (here / name).exists()]
        if not found:
            self.reason = _why_not_built(here)
            return
        try:
            if _truncated(found[0]):
                raise OSError("the file is truncated")
            torch.ops.load_library(str(found[0]))
            self._functions = ctypes.CDLL(str(found[0]))
        except (OSError, RuntimeError) as error:
            # torch's own message only names the file; what the loader said is the cause.
            self.reason = f"{found[0].name} does not load: {error.__cause__ or error}"
            return
        self.path = found[0]

    def isa_supported(self) -> str | None:
        """The highest instruction-set level of this machine and build, or None without a library."""
        return ISA_LEVELS[self._functions.rk_isa_supported()] if self._functions else None

    def isa(self) -> str | None:
        """The instruction-set level in use, or None without a library."""
        return ISA_LEVELS[self._functions.rk_isa_current()] if self._functions else None

    def select_isa(self, level: str) -> None:
        """Lowers (or restores) the instruction-set level.

        Raises:
            ValueError: the level does not exist.
            RuntimeError: the machine or the build does not have it.
        """
        if level not in ISA_LEVELS:
            raise ValueError(f"the ISA level must be one of {', '.join(ISA_LEVELS)}, but is {level!r}")
        if self._functions is None:
            raise RuntimeError(f"the ISA level {level!r} needs the native library: {self.reason}")
        if self._functions.rk_isa_select(ISA_LEVELS.index(level)):
            raise RuntimeError(f"this machine and build support {self.isa_supported()!r} at most, not {level!r}")

    @property
    def has_cuda(self) -> bool:
        """Whether the library holds CUDA kernels, which it does if nvcc was there when it was built."""
        return self._functions is not None and hasattr(self._functions, "rk_cuda_select_bounds_check")

    def cuda_release(self) -> tuple[int, int] | None:
        """The release of the CUDA toolkit that built the CUDA kernels, or None without them."""
        if self._functions is None or not self.has_cuda:
            return None
        return divmod(self._functions.rk_cuda_release(), 100)

    def cuda_architectures(self) -> tuple[int, ...]:
        """The GPU architectures that the library holds code for, ascending: 75, 80, ..."""
        if self._functions is None or not self.has_cuda:
            return ()
        self._functions.rk_cuda_architectures.restype = ctypes.c_char_p
        return tuple(map(int, self._functions.rk_cuda_architectures().decode().split("_")))

    def cuda_ptx(self) -> int:
        """The architecture of which the library holds PTX, or 0."""
        return int(self._functions.rk_cuda_ptx()) if self._functions is not None and self.has_cuda else 0

    def serves(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the library's CUDA kernels."""
        number = 10 * capability[0] + capability[1]
        # Machine code runs on GPUs of its generation that are not older; PTX is compiled for all that are not.
        own = any(built // 10 == capability[0] and built <= number for built in self.cuda_architectures())
        return own or 0 < self.cuda_ptx() <= number

    def select_bounds_check(self, mode: str) -> None:
        """Tells the CUDA kernels, if there are any, what to do about wrong indices: one of BOUNDS_CHECKS."""
        if self._functions is not None and self.has_cuda:
            self._functions.rk_cuda_select_bounds_check(BOUNDS_CHECKS.index(mode))

    def take_fault(self, device: int) -> tuple[int, ...] | None:
        """The faults that CUDA kernels of a device found since the last call; the caller has synchronized with them.

        The six numbers mean what the family of the kernels says of them (see ``selection.register_faults``).
        """
        record = (ctypes.c_int64 * 6)()
        if self._functions is None or not self.has_cuda or not self._functions.rk_cuda_take_fault(device, record):
            return None
        return tuple(record)


native = NativeLibrary()
