"""Compares recsys_kernels with its peers and renders the result.

    python bench/report.py --out DIR                   all cases, about 15 minutes; leave the machine alone meanwhile
    python bench/report.py --case 'int8-d64.*zipf'     some cases, Markdown on stdout
    python bench/report.py --json DIR/results.json     renders a saved run again

Cases run in a process of their own: one with torch's allocator as it is, one with its huge pages switched on
(THP_MEM_ALLOC_ENABLE=1, which torch reads once at start).
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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed recsys_kernels comes before the source tree

from bench import harness  # noqa: E402
from bench.cases import BEST, CASES, LIMIT_SHARE, Case, last_level_cache  # noqa: E402
from bench.harness import Pair, Result  # noqa: E402
from bench.probe import Limit  # noqa: E402
from recsys_kernels import __version__  # noqa: E402
from recsys_kernels._backends import chosen  # noqa: E402
from recsys_kernels._native import native  # noqa: E402

THP = "THP_MEM_ALLOC_ENABLE"
PACKAGES = ("torch", "fbgemm_gpu-cpu", "torchrec", "numpy")

NOTE = """\
Ratios are theirs / ours (above 1: ours is faster): the median over rounds that alternate the two sides in one process,
with the 10th and 90th percentile; every turn of a side begins with a call that is not timed, and malloc keeps what is
freed, for both. GB/s count the bytes of the rows read. The last-level cache holds {cache}: a table of
less than twice that is partly served from it. The limit is what a probe reads from the same rows, on 2 MiB pages, with
nothing but prefetches and loads; small or skewed cases stay in caches and the call itself counts, so their share of it
says little. "Reached" also asks for a ratio of at least 1.0 against every peer."""


@dataclass(frozen=True)
class Run:
    """All cases, measured in one process.

    thp: the value of THP_MEM_ALLOC_ENABLE; cache: bytes of the last-level cache; wrong: why cases failed the
    gate; left_out: why cases were not measured.
    """

    thp: str
    cache: int
    results: list[Result]
    wrong: dict[str, str]
    left_out: dict[str, str]


def run_cases(cases: list[Case], quick: bool) -> Run:
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
    return Run(os.environ.get(THP, "0"), last_level_cache(), results, wrong, left_out)


def run_in_child(cases: list[Case], quick: bool, thp: str) -> Run:
    """`run_cases` in a new process with torch's huge-page switch set to `thp`."""
    os.environ[THP] = thp
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run_cases, cases, quick).result()


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
    dirty = " (with changes)" if _command("git", "status", "--porcelain", "--untracked-files=no") else ""
    return {
        "CPU": f"{model[1] if model else platform.processor()}, {len(os.sched_getaffinity(0))} CPUs",
        "Caches": ", ".join(levels),
        "Memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "Transparent huge pages": _read("/sys/kernel/mm/transparent_hugepage/enabled"),
        "System": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "recsys_kernels": f"{__version__}, backend {chosen('embedding_bag', 'cpu')}, {native.isa() or native.reason}",
        "Versions": ", ".join(f"{package} {_version(package)}" for package in PACKAGES),
        "Commit": (_command("git", "rev-parse", "--short=12", "HEAD") or "unknown") + dirty,
        "Load average at the start": f"{os.getloadavg()[0]:.1f}",
        "Date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def save(path: Path, facts: dict[str, str], runs: list[Run]) -> None:
    """Writes what `load` reads."""
    path.write_text(json.dumps({"machine": facts, "runs": [asdict(run) for run in runs]}, indent=1) + "\n")


def load(path: Path) -> tuple[dict[str, str], list[Run]]:
    """Reads a saved comparison. Raises OSError, ValueError, KeyError or TypeError for anything else."""

    def result(raw: dict[str, Any]) -> Result:
        limit = Limit(**raw["limit"]) if raw["limit"] else None
        return Result(Case(**raw["case"]), [Pair(**pair) for pair in raw["pairs"]], limit, raw["absent"])

    data = json.loads(path.read_text())
    runs = [
        Run(run["thp"], run["cache"], [result(raw) for raw in run["results"]], run["wrong"], run["left_out"])
        for run in data["runs"]
    ]
    return data["machine"], runs


def _time(seconds: float) -> str:
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _size(count: float) -> str:
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.1f} GiB"


def _ratio(pair: Pair) -> str:
    return f"{pair.ratio:.2f} [{pair.low:.2f}-{pair.high:.2f}]"


def _table(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows))


def _target(result: Result) -> str:
    case = result.case
    text = f"{case.target:.1f}x" + ("" if case.against == BEST else f" {case.against}")
    return text + (f", {LIMIT_SHARE:.0%} of limit" if case.near_limit else "")


def _pages(limit: Limit) -> str:
    return "" if limit.huge_pages > 0.9 else f", {limit.huge_pages:.0%} on huge pages"


def _summary(result: Result, cache: int) -> list[str]:
    case, best, limit = result.case, result.best, result.limit
    return [
        case.name,
        f"{_size(case.table_bytes)} ({case.table_bytes / cache:.1f}x)",
        _time(result.seconds),
        f"{best.name} {_time(best.theirs)}",
        _ratio(best),
        f"{result.rate() / 1e9:.2f}",
        f"{limit.gather / 1e9:.2f} ({limit.prefetch}{_pages(limit)})" if limit else "-",
        f"{result.share:.0%}" if result.share is not None else "-",
        _target(result),
        "yes" if result.reached else "no",
    ]


def markdown(facts: dict[str, str], runs: list[Run]) -> str:
    """The whole report as Markdown."""
    parts = ["# Embedding bag against its peers", _table(["Machine", ""], [list(item) for item in facts.items()])]
    parts.append(NOTE.format(cache=_size(runs[0].cache)))
    columns = [
        "Case",
        "Tables (of cache)",
        "Ours",
        "Best peer",
        "Ratio",
        "GB/s",
        "Limit GB/s",
        "% of limit",
        "Target",
        "Reached",
    ]
    for run in runs:
        pages = "on huge pages" if run.thp == "1" else "as it comes"
        parts.append(f"## torch's allocator {pages} ({THP}={run.thp})")
        parts.append(_table(columns, [_summary(result, run.cache) for result in run.results]))
        sides = list(dict.fromkeys(pair.name for result in run.results for pair in result.pairs))
        rows = []
        for result in run.results:
            by_name = {pair.name: _ratio(pair) for pair in result.pairs}
            rows.append([result.case.name, *(by_name.get(name, "") for name in sides)])
        parts += ["Ratio against every side:", _table(["Case", *sides], rows)]
        absent = run.left_out | {name: why for result in run.results for name, why in result.absent.items()}
        if absent:
            parts += ["Not compared:", "\n".join(f"- {name}: {why}" for name, why in absent.items())]
        if run.wrong:
            parts += ["**Wrong results, not timed:**", "\n".join(f"- {why}" for why in run.wrong.values())]
    return "\n\n".join(parts) + "\n"


def plot(facts: dict[str, str], run: Run, path: Path) -> None:
    """Roofline (rate over row size, with the probed roofs) beside the share of the limit for every case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    results = [result for result in run.results if result.limit]
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, 2.5 + 0.3 * max(10, len(results))), layout="constrained")
    large = sorted((r for r in results if r.case.near_limit), key=lambda r: (r.case.row_bytes, r.case.dtype))
    by_size = {r.case.row_bytes: r.limit for r in large if r.limit}
    roof.plot(
        list(by_size), [limit.gather / 1e9 for limit in by_size.values()], "k-", label="limit: random rows, probed"
    )
    roof.plot(
        list(by_size),
        [limit.sequential / 1e9 for limit in by_size.values()],
        "k--",
        label="limit: sequential read, probed",
    )
    for dtype, marker in {"fp32": "o", "fp16": "s", "int8": "^", "int4": "D"}.items():
        mine = [r for r in large if r.case.dtype == dtype]
        if not mine:
            continue
        sizes = [r.case.row_bytes for r in mine]
        roof.plot(sizes, [r.rate() / 1e9 for r in mine], f"C0{marker}", label=f"{dtype}, recsys_kernels")
        roof.plot(
            sizes, [r.rate(r.best) / 1e9 for r in mine], f"C1{marker}", label=f"{dtype}, best peer", fillstyle="none"
        )
    roof.set(
        xlabel="Row size (bytes)", ylabel="Rows read (GB/s)", title="Roofline: uniform ids, B=4096, L=20, one thread"
    )
    roof.set_xscale("log", base=2)
    roof.xaxis.set_major_formatter("{x:.0f}")
    roof.set_ylim(bottom=0)
    roof.legend(fontsize="small")
    roof.grid(alpha=0.3)
    place = [-number for number in range(len(results))]
    bars.barh(
        [p + 0.2 for p in place], [100 * (r.share or 0) for r in results], 0.4, color="C0", label="recsys_kernels"
    )
    theirs = [100 * r.rate(r.best) / r.limit.gather for r in results if r.limit]
    bars.barh([p - 0.2 for p in place], theirs, 0.4, color="C1", label="best peer")
    bars.axvline(100 * LIMIT_SHARE, color="k", linestyle=":", label=f"{LIMIT_SHARE:.0%} of the limit")
    bars.set_yticks(place, [result.case.name for result in results], fontsize="small")
    bars.set(xlabel="Share of the probed limit for the same rows (%)", title="Every forward case")
    bars.legend(fontsize="small")
    figure.suptitle(facts["CPU"])
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when a side gave wrong results, 2 for bad arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md, roofline.png and results.json there")
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
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--json {options.json}: not a saved comparison: {error!r}")
    else:
        cases = [case.resized(options.rows, options.quick) for case in CASES if re.search(options.case, case.name)]
        if not cases:
            parser.error(f"--case {options.case}: matches none of {', '.join(case.name for case in CASES)}")
        facts = machine()
        runs = [run_in_child(cases, options.quick, thp) for thp in {"off": "0", "on": "1", "both": "01"}[options.thp]]
    text = markdown(facts, runs)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        save(options.out / "results.json", facts, runs)  # first: it took the longest
        (options.out / "report.md").write_text(text)
        plot(facts, runs[0], options.out / "roofline.png")
    print(text)
    return int(any(run.wrong for run in runs))


if __name__ == "__main__":
    sys.exit(main())
