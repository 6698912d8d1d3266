"""What the cases of all families have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, TypeVar

BEST = "the best peer"
BEST_OTHER = "the best other peer"  # the best peer that is not the family's baseline

_Case = TypeVar("_Case", bound="BenchCase")


class Target(NamedTuple):
    """The ratio to reach against side `against`."""

    ratio: float
    against: str = BEST


@dataclass(frozen=True, kw_only=True)
class BenchCase(ABC):
    """One measured situation, which is one line of the report. A family derives its own class of cases.

    family: the name under which the family is registered.
    threads: threads that our side and its peers may use.
    kind: "forward", or what else the family measures (gradients, a training step).
    level: "function" for the operator itself, or "module", which adds what a module does in Python.
    targets: ratios to reach besides being no slower than every peer; without one the case is only shown.
    near_limit: the case also has to reach LIMIT_SHARE of the probed limit.
    """

    family: ClassVar[str]
    threads: int = 1
    kind: str = "forward"
    level: str = "function"
    targets: tuple[Target, ...] = (Target(1.0),)
    near_limit: bool = False

    def __post_init__(self) -> None:
        # JSON has neither tuples nor named tuples.
        object.__setattr__(self, "targets", tuple(Target(*target) for target in self.targets))

    @property
    def name(self) -> str:
        """The case's name without blanks, unique among all families: `--case` is matched against the name."""
        return "-".join(self.name_parts) + (f"-{self.threads}threads" if self.threads > 1 else "")

    @property
    @abstractmethod
    def name_parts(self) -> list[str]:
        """The parts of the name but for the number of threads."""

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes of the tables or weights."""

    @property
    @abstractmethod
    def amount(self) -> int:
        """What one call does, in the unit of the family's rates: bytes read, or operations."""

    def resized(self: _Case, rows: int | None, quick: bool) -> _Case:
        """The same case with tables of `rows` rows, or with small tables or weights when `quick`."""
        return self
