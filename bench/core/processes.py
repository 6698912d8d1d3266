"""Cases are measured in processes of their own, as torch and the peers read their settings once at start."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

from bench.core import harness, levels
from bench.core.cases import BenchCase
from bench.core.machine import last_level_cache
from bench.core.render import THP
from bench.core.results import Result, Run
from bench.core.sides import AbsentError


def run_cases(cases: Sequence[BenchCase], quick: bool) -> Run:
    """Measures the cases in this process, with a line on stderr for each."""
    results: list[Result] = []
    wrong, left_out = {}, {}
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.name}", end=" ", file=sys.stderr, flush=True)
        try:
            result = harness.measure(case, quick)
        except harness.GateError as error:
            wrong[case.name] = str(error)
            print("WRONG RESULTS", file=sys.stderr)
        except AbsentError as error:
            left_out[case.name] = str(error)
            print(f"left out: {error}", file=sys.stderr)
        else:
            results.append(result)
            print(f"{result.best.ratio:.2f}x {result.best.name}", file=sys.stderr)
    return Run(os.environ.get(THP, "0"), last_level_cache(), results, wrong, left_out, levels.of_sides())


def run_in_child(cases: Sequence[BenchCase], quick: bool, thp: str) -> Run:
    """`run_cases` in a new process with torch's huge-page switch set to `thp`, and peers held to our level.

    Every number of threads gets a process, since a library may keep to the CPUs that it was started on. The new process
    imports the modules of the cases, which registers their families there.
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
