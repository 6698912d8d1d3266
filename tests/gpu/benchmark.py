"""Times lookups and linear layers on a GPU beside torch's and, where installed, FBGEMM's; prints one line of JSON.

All sides of a case are timed in one process in turn, a round each, by the GPU's own events over calls that are queued
without waiting; every call has other indices, and tables are many times the cache. A copy of the same run says what the
memory can do. Our bounds checks are as they are by default, but for Triton's, which would wait at every call.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

from layers import LayerCase, LayerWorkload, layer_cases  # noqa: E402
from sparse_layers import SparseCase, SparseWorkload, sparse_cases  # noqa: E402

import recsys_kernels as rk  # noqa: E402
from bench.ops.embedding_bag.cases import BITS  # noqa: E402
from bench.ops.embedding_bag.cases import EmbeddingBagCase as Case  # noqa: E402
from recsys_kernels.backends import selection  # noqa: E402
from recsys_kernels.testing import assert_matches  # noqa: E402

TABLE_BYTES = 1 << 30
BATCHES = 16
SAMPLE_SECONDS = 2e-3
MOST_ROUNDS = 40
CASE_SECONDS = 10.0
AnyCase = Case | LayerCase | SparseCase
MARGIN = 5.0  # for the process to end
OURS = "recsys_kernels, CUDA C++"


def cases() -> Iterator[Case]:
    """What is measured, most telling first: when time runs out, the rest is left out."""
    for dtype in BITS:
        for dim in (64, 128):
            rows = TABLE_BYTES * 8 // (dim * BITS[dtype])
            yield Case(dtype, dim, 65536, 20, rows=rows)
            yield Case(dtype, dim, 4096, 20, rows=rows)
    for dtype in ("fp16", "int8"):
        rows = TABLE_BYTES * 8 // (64 * BITS[dtype])
        yield Case(dtype, 64, 65536, 20, rows=rows, ids="zipf")
        yield Case(dtype, 64, 64, 20, rows=rows)
        yield Case(dtype, 64, 1, 50, rows=rows)
    tables = Case("fp32", 64, 512, 1, rows=300_000, tables=26)
    yield tables
    yield replace(tables, length=10)
    yield replace(tables, batch=1)
    yield Case("fp32", 64, 2048, 20, rows=100_000, kind="dense backward")


@dataclass(frozen=True)
class Side:
    """One way to do a case's work: `run(indices)`, within `context()`."""

    name: str
    run: Callable[[Any], Any]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class Workload:
    """Tables, indices and the sides of a case, all on the device."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self.generator = torch.Generator(device).manual_seed(17)
        shape = (BATCHES, case.ids_per_call)
        if case.ids == "zipf":  # ranks uniform in their logarithm; the product scatters the hot rows
            uniform = torch.rand(shape, generator=self.generator, device=device, dtype=torch.float64)
            ranks = (uniform * math.log(case.rows)).exp().long().clamp_(1, case.rows) - 1
            self.indices = ranks * 2_654_435_761 % case.rows
        else:
            self.indices = torch.randint(case.rows, shape, generator=self.generator, device=device)
        self.offsets = torch.arange(0, case.ids_per_call + 1, case.length, device=device)

    def table(self, dtype: torch.dtype) -> Tensor:
        """[tables * rows, dim] of small numbers."""
        shape = (self.case.tables * self.case.rows, self.case.dim)
        return torch.empty(shape, dtype=dtype, device=self.device).uniform_(-1, 1, generator=self.generator)

    @property
    def bytes_per_call(self) -> int:
        """Rows with their scales, indices and offsets read, and the output written."""
        case = self.case
        scales = 4 * case.ids_per_call if BITS[case.dtype] < 16 else 0
        element = 2 if case.dtype == "fp16" else 4
        if case.kind == "dense backward":
            out = (case.rows + case.batch) * case.dim * 4
            return out + 8 * (case.ids_per_call + case.batch + 1)
        output = case.tables * case.batch * case.dim * element
        return case.ids_per_call * (case.row_bytes + 8) + scales + 8 * self.offsets.numel() + output

    def sides(self) -> tuple[list[Side], dict[str, str]]:
        """Ours first; and those that cannot run here, with the reason."""
        ours, plain = (self._backward if self.case.kind != "forward" else self._lookups)()
        found = [Side(OURS, ours, lambda: rk.backend("cuda"))]
        absent: dict[str, str] = {}
        reason = selection.why_not("triton")
        if reason is None:
            found.append(Side("recsys_kernels, Triton", ours, _triton))
        else:
            absent["recsys_kernels, Triton"] = reason
        found.extend(plain)
        if self.case.kind == "forward":
            try:
                found.append(_fbgemm(self))
            except Exception as error:  # whatever a build for another torch or GPU raises
                absent["fbgemm_gpu"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return found, absent

    def _lookups(self) -> tuple[Callable[[Tensor], Tensor], list[Side]]:
        case, offsets = self.case, self.offsets
        options: dict[str, Any] = {"mode": "sum", "include_last_offset": True}
        if case.tables > 1:
            return self._collection(options)
        if BITS[case.dtype] >= 16:
            table = self.table(torch.float32 if case.dtype == "fp32" else torch.float16)
            run = lambda indices: rk.functional.embedding_bag(indices, table, offsets, **options)  # noqa: E731
            return run, [Side("torch", lambda indices: F.embedding_bag(indices, table, offsets, **options))]
        bits, columns = BITS[case.dtype], case.dim * BITS[case.dtype] // 8
        shape = (case.rows, columns)
        rows = torch.randint(256, shape, dtype=torch.uint8, generator=self.generator, device=self.device)
        scales = torch.empty(case.rows, 2, dtype=torch.float16, device=self.device)
        scales.uniform_(-1, 1, generator=self.generator)
        quantized_table = (rows, scales, 0, case.dim, bits)

        def quantized(indices: Tensor) -> Any:
            lookup = selection.implementation("quantized_embedding_bag", indices)
            dtype = selection.dtype_argument(torch.float32)
            return lookup(*quantized_table, indices, offsets, None, 0, -1, True, dtype)

        # torch has no quantized lookup on GPUs: what its users take instead are half rows.
        half = Workload(replace(case, dtype="fp16"), self.device).table(torch.float16)
        return quantized, [Side("torch, fp16 rows", lambda indices: F.embedding_bag(indices, half, offsets, **options))]

    def _collection(self, options: dict[str, Any]) -> tuple[Callable[[Tensor], Tensor], list[Side]]:
        case, offsets = self.case, self.offsets
        tables = [rk.EmbeddingBagConfig(f"t{t}", case.rows, case.dim) for t in range(case.tables)]
        collection = rk.EmbeddingBagCollection(tables).to(self.device).requires_grad_(False)
        weights = [collection.table(f"t{t}") for t in range(case.tables)]
        own = offsets[: case.batch + 1]

        def loop(indices: Tensor) -> Tensor:
            parts = zip(weights, indices.view(case.tables, -1), strict=True)
            return torch.cat([F.embedding_bag(part, weight, own, **options) for weight, part in parts], 1)

        return lambda indices: collection(indices, offsets), [Side("torch", loop)]

    def _backward(self) -> tuple[Callable[[Tensor], Tensor], list[Side]]:
        case, offsets = self.case, self.offsets
        table = self.table(torch.float32).requires_grad_()
        grad = torch.ones(case.batch, case.dim, device=self.device)
        options: dict[str, Any] = {"mode": "sum", "include_last_offset": True}

        def gradient(lookup: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
            def run(indices: Tensor) -> Tensor:
                # Forward and backward: the tape belongs to one forward.
                return torch.autograd.grad(lookup(indices, table, offsets, **options), table, grad)[0]

            return run

        return gradient(rk.functional.embedding_bag), [Side("torch", gradient(F.embedding_bag))]


class _triton(ExitStack):  # noqa: N801 - a context, used as a function
    """Triton's kernels, which by default would wait at every call to raise what they found."""

    def __enter__(self) -> Any:
        self.enter_context(rk.backend("triton"))
        self.enter_context(rk.bounds_check("ignore"))
        return super().__enter__()


def _fbgemm(work: Workload) -> Side:
    """FBGEMM's table-batched lookup for inference, with tables of zeros: what they hold costs nothing."""
    from fbgemm_gpu import split_table_batched_embeddings_ops_common as common
    from fbgemm_gpu import split_table_batched_embeddings_ops_inference as inference
    from fbgemm_gpu.split_embedding_configs import SparseType

    case = work.case
    module = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [
            (f"t{t}", case.rows, case.dim, getattr(SparseType, case.dtype.upper()), common.EmbeddingLocation.DEVICE)
            for t in range(case.tables)
        ],
        device=work.device,
        output_dtype=SparseType.FP16 if case.dtype == "fp16" else SparseType.FP32,
        bounds_check_mode=common.BoundsCheckMode.NONE,
    )
    module.initialize_weights()
    offsets, indices = work.offsets.int(), work.indices.int()
    own = {work.indices[n].data_ptr(): indices[n] for n in range(BATCHES)}
    return Side("fbgemm_gpu", lambda batch: module(own[batch.data_ptr()], offsets))


def _sides_of_layers(work: LayerWorkload | SparseWorkload) -> tuple[list[Side], dict[str, str]]:
    """Ours first; and those that cannot run here, with the reason."""
    peers, absent = work.peers()
    found = [Side(OURS, work.ours, lambda: rk.backend("cuda"))]
    reason = selection.why_not("triton")
    if reason is None:
        found.append(Side("recsys_kernels, Triton", work.ours, _triton))
    else:
        absent["recsys_kernels, Triton"] = reason
    return found + [Side(name, run) for name, run in peers.items()], absent


def copy_rate(device: torch.device) -> tuple[int, float]:
    """Bytes of a copy and the best rate of several, counting what is read and what is written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), float("inf")
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1e3)
    return source.nbytes, 2 * source.nbytes / best


def sample(side: Side, work: Workload | LayerWorkload | SparseWorkload, first: int, calls: int) -> float:
    """Seconds a call, over some calls in a row, by the GPU's clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with side.context():
        begin.record()
        for n in range(first, first + calls):
            side.run(work.indices[n % BATCHES])
        end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def measure(case: AnyCase, device: torch.device, until: float) -> dict[str, Any]:
    """All sides of a case, in turn, until a point in time."""
    work: Workload | LayerWorkload | SparseWorkload
    if isinstance(case, Case):
        work = Workload(case, device)
        sides, absent = work.sides()
    else:
        work = LayerWorkload(case, device) if isinstance(case, LayerCase) else SparseWorkload(case, device)
        sides, absent = _sides_of_layers(work)
    with sides[0].context():
        ours = sides[0].run(work.indices[0])
        rk.check_bounds(device)
    with rk.backend("reference"):
        assert_matches(ours, sides[0].run(work.indices[0]))
    del ours
    ready: list[tuple[Side, int]] = []
    for side in sides:
        try:
            sample(side, work, 0, 2)
            ready.append((side, max(1, min(512, int(SAMPLE_SECONDS / sample(side, work, 2, 4)) + 1))))
        except Exception as error:
            if side.name == OURS:
                raise
            absent[side.name] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    times: dict[str, list[float]] = {side.name: [] for side, _ in ready}
    for number in range(MOST_ROUNDS):
        # Which side comes first changes every round.
        for side, calls in ready[number % len(ready) :] + ready[: number % len(ready)]:
            times[side.name].append(sample(side, work, number * calls, calls))
        if time.monotonic() > until and number >= 2:
            break
    found: dict[str, Any] = {name: {"absent": reason} for name, reason in absent.items()}
    for name, seconds in times.items():
        median = statistics.median(seconds)
        found[name] = {"seconds": median, "bytes_per_second": work.bytes_per_call / median, "rounds": len(seconds)}
        if name != OURS:
            ratios = sorted(theirs / mine for theirs, mine in zip(seconds, times[OURS], strict=True))
            found[name] |= {
                "ratio": statistics.median(ratios),
                "low": ratios[len(ratios) // 10],
                "high": ratios[-1 - len(ratios) // 10],
            }
    return {"name": case.name, "rows": case.rows, "bytes": work.bytes_per_call, "sides": found}


def main() -> int:
    """Returns 1 if a case failed; the figures of the others are printed all the same."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--until", type=float, help="by time.monotonic(); cases for which no time is left are left out")
    until = parser.parse_args().until
    lookups, layers, sparse = list(cases()), list(layer_cases()), list(sparse_cases())
    everything = [*lookups[:8], *layers[:4], *sparse[:4], *lookups[8:], *layers[4:], *sparse[4:]]
    return run_cases(everything, math.inf if until is None else until - MARGIN)


def run_cases(everything: list[AnyCase], end: float) -> int:
    """Measures until a point in time; prints the record after each case, so that nothing is lost at the end."""
    device = torch.device("cuda", torch.cuda.current_device())
    size, rate = copy_rate(device)
    record: dict[str, Any] = {"copy_bytes": size, "copy_bytes_per_second": rate}
    record |= {"cases": [], "failed": {}, "left_out": []}
    longest = 0.0
    for number, case in enumerate(everything):
        now = time.monotonic()
        if now + longest > end:
            record["left_out"].append(case.name)
            continue
        share = min(CASE_SECONDS, (end - now) / (len(everything) - number))
        try:
            record["cases"].append(measure(case, device, now + share))
        except Exception as error:
            record["failed"][case.name] = f"{type(error).__name__}: {error}"
        longest = max(longest, time.monotonic() - now)
        torch.cuda.empty_cache()
        print(json.dumps(record), flush=True)
    print(json.dumps(record))
    for name, reason in record["failed"].items():
        print(f"{name}: {reason}")
    if record["left_out"]:
        print(f"incomplete: {len(record['left_out'])} of {len(everything)} cases were left out, no time was left")
    return 1 if record["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
