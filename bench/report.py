"""Compares recsys_kernels with its peers and renders the result.

    python bench/report.py --out DIR                   all cases, about 45 minutes; leave the machine alone meanwhile
    python bench/report.py --case 'int8-d64.*zipf'     some cases, Markdown on stdout
    python bench/report.py --case 'int8-linear|mlp'    int8 linear layers and MLPs
    python bench/report.py --case sparse-linear        sparse linear layers, about 30 minutes
    RECSYS_KERNELS_ISA=avx2 python bench/report.py --case 'int8-linear|mlp'    all sides held to AVX2
    python bench/report.py --json DIR/results.json     renders a saved run again

Cases run in processes of their own: all cases with torch's allocator as it comes, and once more with torch's huge pages
switched on (THP_MEM_ALLOC_ENABLE=1, which torch reads once at start) the cases of families to which huge pages matter.
In those processes RECSYS_KERNELS_ISA (avx2 or avx512) also sets the peers' own switches. A peer without such a switch
is left out.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last, so that an installed recsys_kernels comes before the source tree

from bench.core import machine, results  # noqa: E402
from bench.core.families import all_cases, family_of, registered  # noqa: E402
from bench.core.processes import run_in_child  # noqa: E402
from bench.core.render import markdown  # noqa: E402
from bench.ops import load_families  # noqa: E402


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="write report.md, charts and results.json there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="render this results.json instead of measuring")
    parser.add_argument("--case", default="", metavar="REGEX", help="only cases whose name matches")
    parser.add_argument("--rows", type=int, help="rows of the single-table cases (default: 2,000,000)")
    parser.add_argument(
        "--quick", action="store_true", help="small tables and few rounds: shows that it runs, not how fast"
    )
    parser.add_argument("--thp", choices=("off", "on", "both"), default="both", help="torch's huge-page switch")
    return parser


def _measure(parser: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[dict[str, str], list[results.Run]]:
    """The machine's facts and a run for each setting of the huge-page switch."""
    matching = [case for case in all_cases() if re.search(options.case, case.name)]
    cases = [case.resized(options.rows, options.quick) for case in matching]
    if not cases:
        parser.error(f"--case {options.case}: matches none of {', '.join(case.name for case in all_cases())}")
    facts = machine.facts(package for family in registered() for package in family.packages)
    first, *more = {"off": ["0"], "on": ["1"], "both": ["0", "1"]}[options.thp]
    runs = [run_in_child(cases, options.quick, first)]
    paged = [case for case in cases if family_of(case).huge_pages]
    return facts, runs + [run_in_child(paged, options.quick, thp) for thp in more if paged]


def _write(folder: Path, facts: dict[str, str], runs: list[results.Run], text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results.save(folder / "results.json", facts, runs)  # first, as measuring took the longest
    (folder / "report.md").write_text(text)
    from bench.core import plots  # needs matplotlib

    plots.draw(runs[0].results, facts["CPU"], folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 1 when we gave wrong results, 2 for bad arguments."""
    load_families()
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.json:
        try:
            facts, runs = results.load(options.json)
        except (OSError, *results.UNREADABLE) as error:
            parser.error(f"--json {options.json}: not a saved comparison: {error!r}")
    else:
        facts, runs = _measure(parser, options)
    text = markdown(facts, runs)
    if options.out:
        _write(options.out, facts, runs, text)
    print(text)
    return int(any(run.wrong for run in runs))


if __name__ == "__main__":
    sys.exit(main())
