"""The registry of families: harness, report and `pytest bench` enumerate what the families have registered.

A family's bench package registers a `Family` when it is imported. Cases carry the family's name, and so do results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from bench.core.cases import BenchCase
from bench.core.sides import Side


class Limit(Protocol):
    """What this machine could do at most, in `case.amount` a second, and by what means."""

    @property
    def rate(self) -> float: ...

    @property
    def how(self) -> str: ...


class Workload(Protocol):
    """The data of a case. `checked`: how many batches the gate runs."""

    case: Any
    quick: bool
    checked: int

    def batch(self, number: int) -> Any:
        """The input of call `number`: a tensor, or a tuple of tensors."""

    def check(self, outputs: Sequence[Tensor]) -> None:
        """Raises AssertionError unless `outputs`, in float64, are right for batches 0, 1, 2 and so on."""


class Peers(Protocol):
    """A family's module `peers`: the sides of its comparisons.

    PEERS: a builder for every side but ours; a builder raises AbsentError where the side cannot run.
    """

    @property
    def PEERS(self) -> Mapping[str, Callable[[Any], Side]]: ...  # noqa: N802 - a module's constant

    def ours(self, work: Any, /) -> Side:
        """Our side of a case."""

    def sides_of(self, case: Any, /) -> list[str]:
        """The names of the sides that a case is compared with: keys of PEERS, ONE_THREAD, REFERENCE."""

    def limit(self, work: Any, /) -> Limit | None:
        """The probed limit of a case, None where there is none. Raises ProbeUnavailableError."""


@dataclass(frozen=True)
class Family:
    """All that harness and report need to know of a family of operators.

    name: the family's folder under `recsys_kernels/ops` and `bench/ops`; results carry the name.
    title: the heading of the family's section in the report.
    unit: the unit of rates, in billions of `case.amount` a second.
    size_label: what `case.size` counts, in bytes.
    note: how to read the figures; "{cache}" stands for the size of the last-level cache.
    cases: the cases that are measured.
    case_type, limit_type: the classes that saved results are made of; limit_type: None for a family without probes.
    workload: makes the data of a case, from `workload(case, quick)`.
    peers: the module with the sides.
    plot: the name of the module with `draw(results, cpu, folder)`, imported only when charts are drawn; "" for none.
    packages: the peers' packages, whose versions the report names.
    huge_pages: whether torch's own huge pages matter to the family.
    baseline: the peer to which all others are related; "" for none.
    """

    name: str
    title: str
    unit: str
    size_label: str
    note: str
    cases: Sequence[BenchCase]
    case_type: type[BenchCase]
    workload: Callable[[Any, bool], Workload]
    peers: Peers
    limit_type: type[Any] | None = None
    plot: str = ""
    packages: tuple[str, ...] = ()
    huge_pages: bool = False
    baseline: str = ""


_registered: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family. Raises ValueError if its name or the name of one of its cases is taken."""
    if family.name in _registered:
        raise ValueError(f"a family named {family.name!r} is registered already")
    if family.case_type.family != family.name:
        raise ValueError(f"the cases of family {family.name!r} name the family {family.case_type.family!r}")
    names = [case.name for case in family.cases]
    taken = {case.name for case in all_cases()}
    twice = sorted({name for name in names if name in taken or names.count(name) > 1})
    if twice:
        raise ValueError(f"family {family.name!r}: cases with names that are taken: {', '.join(twice)}")
    _registered[family.name] = family


def registered() -> tuple[Family, ...]:
    """All families in the order of their registration."""
    return tuple(_registered.values())


def family_of(case: BenchCase) -> Family:
    """The family that a case belongs to."""
    return family_named(case.family)


def family_named(name: str) -> Family:
    """The family with that name. Raises KeyError if no such family is registered."""
    if name not in _registered:
        raise KeyError(f"no family named {name!r} is registered, only {', '.join(_registered)}")
    return _registered[name]


def all_cases() -> list[BenchCase]:
    """The cases of all families."""
    return [case for family in registered() for case in family.cases]
