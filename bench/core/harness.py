"""How two sides are measured. On a machine that others use too, only ratios count that are taken in one process.

`Comparison` sets up one case: the comparison probes the limit, builds our side and gates it. `Comparison.against(name)`
builds another side, gates that side and alternates the two: a sample of one, then of the other (which side comes first
changes every round), each over fresh batches of the pool. A round gives one ratio. The median of the ratios and their
10th and 90th percentile are reported. Cases on one thread are pinned to one CPU.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from bench.core.cases import BenchCase
from bench.core.families import Limit, Workload, family_of
from bench.core.probe import ProbeUnavailableError
from bench.core.results import Pair, Result
from bench.core.sides import AbsentError, Side, is_own, variant

SAMPLE_SECONDS = 0.01  # calls shorter than this are timed in groups
MAX_GROUP = 512


class GateError(AssertionError):
    """A side gives wrong results, so its speed means nothing."""


def gate(side: Side, work: Any) -> None:
    """Raises GateError unless `side` gives the right results for the first batches."""
    outputs, before = [], torch.get_num_threads()
    torch.set_num_threads(side.threads)  # what a side compiles at its first call depends on it
    try:
        with side.context():
            for number in range(work.checked):
                output = side.result(side.run(side.prepare(work.batch(number))))
                # A copy: the side may use that memory again.
                outputs.append((output.to_dense() if output.is_sparse else output).to(torch.float64, copy=True))
        (side.check or work.check)(outputs)
    except AssertionError as error:
        raise GateError(f"{side.name} is wrong on {work.case.name}: {error}") from error
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Has glibc keep what was freed, up to 32 MiB a block (the most it takes).

    Otherwise it depends on the order of frees whether a call gets fresh pages for its output, and a page fault costs
    up to 2 us in a virtual machine: the gradient of a 25 MiB table took 1.5 or 7 ms. Servers use allocators that keep.
    """
    glibc = ctypes.CDLL(None)
    if hasattr(glibc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        glibc.mallopt(trim_threshold, 2**31 - 1)
        glibc.mallopt(mmap_threshold, 32 << 20)


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """This thread on `threads` CPUs, with as many threads of torch's, which inherit the CPUs.

    Raises AbsentError where this process may use fewer CPUs.
    """
    allowed, before = os.sched_getaffinity(0), torch.get_num_threads()
    if len(allowed) < threads:
        raise AbsentError(f"{threads} threads need as many CPUs, this process may use {len(allowed)}")
    torch.set_num_threads(threads)  # before: or torch would start more, all on these CPUs for good
    os.sched_setaffinity(0, sorted(allowed)[:threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        os.sched_setaffinity(0, allowed)


@contextmanager
def quiet(threads: int) -> Iterator[None]:
    """`pinned`, and no garbage collection."""
    with pinned(threads):
        gc.collect()
        gc.disable()
        try:
            yield
        finally:
            gc.enable()


def sample(side: Side, work: Any, first: int, calls: int) -> float:
    """Seconds a call of `side`, over batches `first` to `first + calls`, after one that is not timed.

    That one brings back what the other side has driven out: page translations most of all, which a large table needs
    by the thousand (Zen 4 in a virtual machine: the first call after another side took 1.6 times as long).
    """
    run = side.run
    with side.context():
        torch.set_num_threads(side.threads)
        inputs = [side.prepare(work.batch(number)) for number in range(first - 1, first + calls)]
        run(inputs.pop(0))
        begin = time.perf_counter()
        for each in inputs:
            run(each)
        return (time.perf_counter() - begin) / calls


def group_size(side: Side, work: Any) -> int:
    """Calls of `side` that take SAMPLE_SECONDS together."""
    return int(min(MAX_GROUP, max(1.0, SAMPLE_SECONDS / min(sample(side, work, n, 1) for n in range(5)))))


def alternate(own: Side, other: Side, work: Any, seconds: float, min_rounds: int) -> Pair:
    """Alternates the two sides for about `seconds`, at least `min_rounds` rounds."""
    times: dict[str, list[float]] = {own.name: [], other.name: []}
    with quiet(work.case.threads):
        calls = max(group_size(side, work) for side in (own, other))
        batches = itertools.count(0, calls)
        until = time.perf_counter() + seconds
        while len(times[own.name]) < min_rounds or time.perf_counter() < until:
            flip = len(times[own.name]) % 2
            for side in (other, own) if flip else (own, other):
                times[side.name].append(sample(side, work, next(batches), calls))
    ours, theirs = np.array(times[own.name]), np.array(times[other.name])
    low, ratio, high = np.percentile(theirs / ours, [10, 50, 90])
    middle = float(np.median(ours)), float(np.median(theirs))
    return Pair(other.name, *middle, float(ratio), float(low), float(high), len(ours))


def build_side(name: str, work: Workload, own: Side) -> Side:
    """Side `name` of a case; `own` is our side of the case. Raises AbsentError where side `name` cannot run."""
    side = variant(name, own)
    if side is not None:
        return side
    # Pools of threads that a library starts stay on the CPUs on which they were started.
    with pinned(work.case.threads):
        return family_of(work.case).peers.PEERS[name](work)


class Comparison:
    """One case, ready to be compared: `.own` is our side (gated), `.limit` the probe's result, `.work` the data."""

    def __init__(self, case: BenchCase, quick: bool = False) -> None:
        keep_freed_memory()
        self.family = family_of(case)
        self.quick, self.work = quick, self.family.workload(case, quick)
        self.seconds, self.min_rounds = (0.05, 5) if quick else (2.0, 11)
        self.limit: Limit | None = None
        self.no_limit = ""
        try:
            with quiet(case.threads):  # before the tables are there: a probe may need as much memory
                self.limit = self.family.peers.limit(self.work)
        except ProbeUnavailableError as error:
            self.no_limit = str(error)
        self.own = self.family.peers.ours(self.work)
        gate(self.own, self.work)

    def against(self, name: str) -> tuple[Side, Pair]:
        """Builds, gates and measures side `name`. Raises AbsentError (it cannot run) or GateError (it is wrong)."""
        gc.collect()  # the side before this one may hang in a cycle, with its tables
        other = build_side(name, self.work, self.own)
        gate(other, self.work)
        return other, alternate(self.own, other, self.work, self.seconds, self.min_rounds)


def measure(case: BenchCase, quick: bool = False) -> Result:
    """Compares our side of `case` with every side that can run here. A peer with wrong results counts as absent.

    Raises GateError if our own results are wrong, AbsentError if there are too few CPUs.
    """
    comparison = Comparison(case, quick)
    pairs, absent = [], {}
    for name in comparison.family.peers.sides_of(case):
        try:
            pairs.append(comparison.against(name)[1])
        except AbsentError as error:
            absent[name] = str(error)
        except GateError as error:
            if is_own(name):
                raise
            absent[name] = f"not timed: {error}"
    if comparison.no_limit:
        absent["limit"] = comparison.no_limit
    return Result(case, pairs, comparison.limit, absent)
