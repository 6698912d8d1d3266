"""A comparison as Markdown."""

from __future__ import annotations

from collections.abc import Iterable

from bench.core.cases import BEST
from bench.core.families import Family, registered
from bench.core.results import LIMIT_SHARE, Pair, Result, Run

THP = "THP_MEM_ALLOC_ENABLE"
NOTE = """\
Ratios are theirs / ours (above 1: ours is faster): the median over rounds that alternate the two sides in one process,
with the 10th and 90th percentile. Every turn of a side begins with a call that is not timed, and malloc keeps freed
memory, for both sides. "Reached" also asks for a ratio of at least 1.0 against every peer."""


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _size(count: float) -> str:
    power, unit = next(step for step in ((10, "KiB"), (20, "MiB"), (30, "GiB")) if count < 1000 * 2 ** step[0])
    return f"{count / 2**power:.3g} {unit}"


def _ratio(pair: Pair) -> str:
    return f"{pair.ratio:.2f} [{pair.low:.2f}-{pair.high:.2f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


def _target(result: Result) -> str:
    case = result.case
    texts = [f"{ratio:.1f}x" + ("" if against == BEST else f" {against}") for ratio, against in case.targets]
    return ", ".join(texts + ([f"{LIMIT_SHARE:.0%} of limit"] if case.near_limit else [])) or "-"


def _columns(family: Family) -> list[str]:
    rate = [family.unit, f"Limit {family.unit}", "% of limit", "Target", "Reached"]
    first = ["Case", f"{family.size_label} (of cache)", "Ours"]
    against = [f"Of {family.baseline}", "Best other peer"] if family.baseline else ["Best peer"]
    return [*first, *against, "Ratio", *rate]


def _against(result: Result) -> list[str]:
    """The best peer and its ratio; where there is a baseline, the baseline's ratio and the best other peer."""
    if not result.family.baseline:
        return [f"{result.best.name} {_time(result.best.theirs)}", _ratio(result.best)]
    base, other = result.baseline, result.best_other
    named = [f"{other.name} {_time(other.theirs)}", _ratio(other)] if other else ["-", "-"]
    return [_ratio(base) if base else "-", *named]


def _summary(result: Result, cache: int) -> list[str]:
    case, limit = result.case, result.limit
    return [
        case.name,
        f"{_size(case.size)} ({case.size / cache:.1f}x)",
        _time(result.seconds),
        *_against(result),
        f"{result.rate() / 1e9:.2f}",
        f"{limit.rate / 1e9:.2f} ({limit.how})" if limit else "-",
        f"{result.share:.0%}" if result.share is not None else "-",
        _target(result),
        ("yes" if result.reached else "no") if case.targets else "-",
    ]


def _section(family: Family, run: Run) -> list[str]:
    """One family's results of one run; empty where the family has none."""
    results = [result for result in run.results if result.case.family == family.name]
    if not results:
        return []
    sides = list(dict.fromkeys(pair.name for result in results for pair in result.pairs))
    rows = []
    for result in results:
        by_name = {pair.name: _ratio(pair) for pair in result.pairs}
        rows.append([result.case.name, *(by_name.get(name, "") for name in sides)])
    parts = [f"### {family.title}", family.note.format(cache=_size(run.cache))]
    parts.append(_table(_columns(family), [_summary(result, run.cache) for result in results]))
    parts += ["Ratio against every side:", _table(["Case", *sides], rows)]
    absent = dict.fromkeys(item for result in results for item in result.absent.items())
    return parts + (["Not compared:", _list(absent)] if absent else [])


def markdown(facts: dict[str, str], runs: list[Run]) -> str:
    """The whole report as Markdown."""
    parts = [
        "# recsys_kernels against its peers",
        _table(["Machine", ""], [list(item) for item in facts.items()]),
        NOTE,
    ]
    for run in runs:
        pages = "on huge pages" if run.thp == "1" else "as it comes"
        parts.append(f"## torch's allocator {pages} ({THP}={run.thp})")
        if run.levels:
            parts += ["Instruction sets:", _list(run.levels.items())]
        for family in registered():
            parts += _section(family, run)
        if run.left_out:
            parts += ["Not measured:", _list(run.left_out.items())]
        if run.wrong:
            parts += ["**Wrong results, not timed:**", "\n".join(f"- {why}" for why in run.wrong.values())]
    return "\n\n".join(parts) + "\n"
