"""Compares recsys_kernels with its peers and renders the result.

    python bench/report.py --out DIR                   all cases, about 45 minutes; leave the machine alone meanwhile
    python bench/report.py --case 'int8-d64.*zipf'     some cases, Markdown on stdout
    python bench/report.py --case 'int8-linear|mlp'    int8 linear layers and MLPs
    python bench/report.py --case sparse-linear        sparse linear layers, about 30 minutes
    RECSYS_KERNELS_ISA=avx2 python bench/report.py --case 'int8-linear|mlp'    all sides held to AVX2
    python bench/report.py --json DIR/results.json     renders a saved run again

Cases run in a process of their own: one with torch's allocator as it is, one with its huge pages switched on
(THP_MEM_ALLOC_ENABLE=1, which torch reads once at start) for the operators to which they matter. In that process
RECSYS_KERNELS_ISA (avx2 or avx512) also sets the peers' own switches; peers without one are left out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed recsys_kernels comes before the source tree

from bench import harness, levels, operators  # noqa: E402
from bench.cases import LIMIT_SHARE, last_level_cache  # noqa: E402
from bench.harness import Pair, Result  # noqa: E402
from bench.operators import CASES, Operator  # noqa: E402
from bench.sides import BEST  # noqa: E402
from recsys_kernels import __version__  # noqa: E402
from recsys_kernels.backends.native import native  # noqa: E402
from recsys_kernels.backends.selection import chosen  # noqa: E402

UNREADABLE = (ValueError, KeyError, TypeError, StopIteration)  # what a file with other contents leads to
THP = "THP_MEM_ALLOC_ENABLE"
NOTE = """\
Ratios are theirs / ours (above 1: ours is faster): the median over rounds that alternate the two sides in one process,
with the 10th and 90th percentile; every turn of a side begins with a call that is not timed, and malloc keeps what is
freed, for both. "Reached" also asks for a ratio of at least 1.0 against every peer."""


@dataclass(frozen=True)
class Run:
    """All cases, measured with one setting of torch's allocator.

    thp: the value of THP_MEM_ALLOC_ENABLE; cache: bytes of the last-level cache; wrong: why our side failed the
    gate; left_out: why cases were not measured; levels: the instruction-set level of every side.
    """

    thp: str
    cache: int
    results: list[Result]
    wrong: dict[str, str]
    left_out: dict[str, str]
    levels: dict[str, str]


def run_cases(cases: list[Any], quick: bool) -> Run:
    """Measures the cases in this process, with a line on stderr for each."""
    results, wrong, left_out = [], {}, {}
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", end=" ", file=sys.stderr, flush=True)
        try:
            result = harness.measure(case, quick)
        except harness.GateError as error:
            wrong[case.name] = str(error)
            print("WRONG RESULTS", file=sys.stderr)
        except harness.AbsentError as error:
            left_out[case.name] = str(error)
            print(f"left out: {error}", file=sys.stderr)
        else:
            results.append(result)
            print(f"{result.best.ratio:.2f}x {result.best.name}", file=sys.stderr)
    return Run(os.environ.get(THP, "0"), last_level_cache(), results, wrong, left_out, levels.of_sides())


def run_in_child(cases: list[Any], quick: bool, thp: str) -> Run:
    """`run_cases` in a new process with torch's huge-page switch set to `thp`, and peers held to our level.

    One process for each number of threads: a library may keep to the CPUs that it was started on.
    """
    os.environ.update({THP: thp, **levels.caps()})
    parts = []
    for threads in sorted({case.threads for case in cases}):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            mine = [case for case in cases if case.threads == threads]
            parts.append(pool.submit(run_cases, mine, quick).result())
    return replace(
        parts[0],
        results=[result for part in parts for result in part.results],
        wrong={name: why for part in parts for name, why in part.wrong.items()},
        left_out={name: why for part in parts for name, why in part.left_out.items()},
    )


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).exists() else "unknown"


def _command(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def machine() -> dict[str, str]:
    """What the figures depend on, as text."""
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    caches = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")
    levels = (f"L{_read(f'{c}/level')} {_read(f'{c}/type')} {_read(f'{c}/size')}" for c in sorted(caches))
    packages = ("torch", "numpy", *(package for operator in operators.ALL for package in operator.packages))
    dirty = " (with changes)" if _command("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "CPU": f"{model[1] if model else platform.processor()}, {len(os.sched_getaffinity(0))} CPUs",
        "Caches": ", ".join(levels),
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "Transparent huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "recsys_kernels": f"{__version__}, backend {chosen('embedding_bag', 'cpu')}, {native.isa() or native.reason}",
        "Versions": ", ".join(f"{package} {_version(package)}" for package in packages),
        "Commit": (_command("git", "rev-parse", "--short=12", "HEAD") or "unknown") + dirty,
        "Load average at the start": f"{os.getloadavg()[0]:.1f}",
        "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def save(path: Path, facts: dict[str, str], runs: list[Run]) -> None:
    """Writes what `load` reads."""
    path.write_text(json.dumps({"machine": facts, "runs": [asdict(run) for run in runs]}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, str], list[Run]]:
    """Reads a saved comparison. Raises OSError or UNREADABLE for anything else."""

    def result(raw: dict[str, Any]) -> Result:
        operator = next(one for one in operators.ALL if set(raw["case"]) == {each.name for each in fields(one.case)})
        limit = operator.limit(**raw["limit"]) if raw["limit"] else None
        return Result(operator.case(**raw["case"]), [Pair(**pair) for pair in raw["pairs"]], limit, raw["absent"])

    data = json.loads(path.read_text())
    runs = [
        Run(**(run | {"results": [result(raw) for raw in run["results"]], "levels": run.get("levels", {})}))
        for run in data["runs"]
    ]
    return data["machine"], runs


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _size(count: float) -> str:
    power, unit = next(step for step in ((10, "KiB"), (20, "MiB"), (30, "GiB")) if count < 1000 * 2 ** step[0])
    return f"{count / 2**power:.3g} {unit}"


def _ratio(pair: Pair) -> str:
    return f"{pair.ratio:.2f} [{pair.low:.2f}-{pair.high:.2f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _target(result: Result) -> str:
    case = result.case
    texts = [f"{ratio:.1f}x" + ("" if against == BEST else f" {against}") for ratio, against in case.targets]
    return ", ".join(texts + ([f"{LIMIT_SHARE:.0%} of limit"] if case.near_limit else [])) or "-"


def _columns(operator: Operator) -> list[str]:
    rate = [operator.unit, f"Limit {operator.unit}", "% of limit", "Target", "Reached"]
    first = ["Case", f"{operator.sized} (of cache)", "Ours"]
    against = [f"Of {operator.baseline}", "Best sparse peer"] if operator.baseline else ["Best peer"]
    return [*first, *against, "Ratio", *rate]


def _against(result: Result) -> list[str]:
    """The best peer and the ratio against it; where there is a baseline, that ratio and the best of the others."""
    if not operators.of(result.case).baseline:
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


def _section(operator: Operator, run: Run) -> list[str]:
    """One operator's results in one run; nothing where it has none."""
    results = [result for result in run.results if isinstance(result.case, operator.case)]
    if not results:
        return []
    sides = list(dict.fromkeys(pair.name for result in results for pair in result.pairs))
    rows = []
    for result in results:
        by_name = {pair.name: _ratio(pair) for pair in result.pairs}
        rows.append([result.case.name, *(by_name.get(name, "") for name in sides)])
    parts = [f"### {operator.title}", operator.note.format(cache=_size(run.cache))]
    parts.append(_table(_columns(operator), [_summary(result, run.cache) for result in results]))
    parts += ["Ratio against every side:", _table(["Case", *sides], rows)]
    absent = dict.fromkeys(item for result in results for item in result.absent.items())
    return parts + (["Not compared:", _list(absent)] if absent else [])


def _list(items: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {text}" for name, text in items)


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
        for operator in operators.ALL:
            parts += _section(operator, run)
        if run.left_out:
            parts += ["Not measured:", _list(run.left_out.items())]
        if run.wrong:
            parts += ["**Wrong results, not timed:**", "\n".join(f"- {why}" for why in run.wrong.values())]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when we gave wrong results, 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md, charts and results.json there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="render this results.json instead of measuring")
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--rows", type=int, help="rows of the single-table cases (default: 2,000,000)")
    parser.add_argument(
        "--quick", action="store_true", help="small tables and few rounds: shows that it runs, not how fast"
    )
    parser.add_argument("--thp", choices=("off", "on", "both"), default="both", help="torch's huge-page switch")
    options = parser.parse_args(arguments)
    if options.json:
        try:
            facts, runs = load(options.json)
        except (OSError, *UNREADABLE) as error:
            parser.error(f"--json {options.json}: not a saved comparison: {error!r}")
    else:
        cases = [case.resized(options.rows, options.quick) for case in CASES if re.search(options.case, case.name)]
        if not cases:
            parser.error(f"--case {options.case}: matches none of {', '.join(case.name for case in CASES)}")
        facts = machine()
        first, *more = {"off": ["0"], "on": ["1"], "both": ["0", "1"]}[options.thp]
        runs = [run_in_child(cases, options.quick, first)]
        paged = [case for case in cases if operators.of(case).huge_pages]
        runs += [run_in_child(paged, options.quick, thp) for thp in more if paged]
    text = markdown(facts, runs)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        save(options.out / "results.json", facts, runs)  # first: it took the longest
        (options.out / "report.md").write_text(text)
        from bench import plots  # needs matplotlib

        plots.draw(runs[0].results, facts["CPU"], options.out)
    print(text)
    return int(any(run.wrong for run in runs))


if __name__ == "__main__":
    sys.exit(main())
