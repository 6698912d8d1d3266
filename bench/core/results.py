"""What a comparison has measured, and the JSON file that keeps the results. Every result carries its family's name."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.core.cases import BEST, BEST_OTHER, BenchCase, Target
from bench.core.families import Family, Limit, family_named, family_of
from bench.core.sides import is_own

LIMIT_SHARE = 0.85  # the share of the probed limit that a case with `near_limit` has to reach
# What a file with other contents leads to.
UNREADABLE = (ValueError, KeyError, TypeError)


@dataclass(frozen=True)
class Pair:
    """Our side against `name`: median seconds a call, and the ratio theirs / ours with its spread over the rounds."""

    name: str
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int


@dataclass(frozen=True)
class Result:
    """Everything that was measured of one case. `absent`: sides that could not run, with the reason."""

    case: Any
    pairs: list[Pair]
    limit: Limit | None
    absent: dict[str, str] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The family of the case."""
        return family_of(self.case)

    @property
    def seconds(self) -> float:
        """The median time of a call of ours, over all pairs."""
        return float(np.median([pair.ours for pair in self.pairs]))

    @property
    def _peers(self) -> list[Pair]:
        return [pair for pair in self.pairs if not is_own(pair.name)]

    @property
    def best(self) -> Pair:
        """The pair with the fastest peer."""
        return min(self._peers, key=lambda pair: pair.ratio)

    @property
    def baseline(self) -> Pair | None:
        """The pair with the family's baseline."""
        return next((pair for pair in self.pairs if pair.name == self.family.baseline), None)

    @property
    def best_other(self) -> Pair | None:
        """The pair with the fastest peer that is not the baseline."""
        others = [pair for pair in self._peers if pair.name != self.family.baseline]
        return min(others, key=lambda pair: pair.ratio, default=None)

    def reaches(self, target: Target) -> bool:
        """Whether the target's ratio was measured; no, when the target's side is absent."""
        ratios = {pair.name: pair.ratio for pair in self.pairs} | {BEST: self.best.ratio}
        if self.best_other:
            ratios[BEST_OTHER] = self.best_other.ratio
        return ratios.get(target.against, 0.0) >= target.ratio

    def rate(self, pair: Pair | None = None) -> float:
        """What `case.amount` counts, a second: our rate, or the rate of the other side of `pair`."""
        return float(self.case.amount / (pair.theirs if pair else self.seconds))

    @property
    def share(self) -> float | None:
        """Our rate as a share of the probed limit."""
        return self.rate() / self.limit.rate if self.limit else None

    @property
    def reached(self) -> bool:
        """All targets, no slower than any peer, and LIMIT_SHARE where the case asks for it and a probe ran.

        True of a case without targets.
        """
        if not self.case.targets:
            return True
        near = not self.case.near_limit or self.share is None or self.share >= LIMIT_SHARE
        return near and all(map(self.reaches, (Target(1.0), *self.case.targets)))


@dataclass(frozen=True)
class Run:
    """All cases, measured with one setting of torch's allocator.

    thp: the value of THP_MEM_ALLOC_ENABLE.
    cache: bytes of the last-level cache.
    wrong: why our side failed the gate, by case; left_out: why a case was not measured.
    levels: the instruction-set level of every side.
    """

    thp: str
    cache: int
    results: list[Result]
    wrong: dict[str, str]
    left_out: dict[str, str]
    levels: dict[str, str]


def save(path: Path, facts: dict[str, str], runs: list[Run]) -> None:
    """Writes the file that `load` reads."""
    raw = [asdict(run) for run in runs]
    for run, saved in zip(runs, raw, strict=True):
        # The name comes first, for whoever reads the file.
        saved["results"] = [
            {"family": result.case.family, **one} for result, one in zip(run.results, saved["results"], strict=True)
        ]
    path.write_text(json.dumps({"machine": facts, "runs": raw}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, str], list[Run]]:
    """Reads a saved comparison. Raises OSError, or one of UNREADABLE for a file with other contents."""
    data = json.loads(path.read_text())
    runs = [Run(**(run | {"results": [_result(**raw) for raw in run["results"]]})) for run in data["runs"]]
    return data["machine"], runs


def _result(
    family: str, case: dict[str, Any], pairs: list[dict[str, Any]], limit: dict[str, Any] | None, absent: dict[str, str]
) -> Result:
    found = family_named(family)
    made: BenchCase = found.case_type(**case)
    return Result(
        made,
        [Pair(**pair) for pair in pairs],
        found.limit_type(**limit) if limit and found.limit_type else None,
        absent,
    )
