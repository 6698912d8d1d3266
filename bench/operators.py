"""The operators that are measured. A new one has its cases and workload in a file of its own, its sides in another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from bench import cases, linear_cases, linear_peers, peers, probe, sparse_cases, sparse_peers


@dataclass(frozen=True)
class Operator:
    """All that harness and report need to know of an operator.

    title: heads its section; unit: of rates, in billions of `case.amount` a second; sized: what `case.size` counts, in
    bytes; note: how to read its figures; case, limit: what saved results are made of; workload(case, quick): its data;
    peers: a module with ours(work), sides_of(case), build(name, work, own) and limit(work); packages: that the peers
    need; huge_pages: whether torch's own huge pages matter to it; baseline: the peer to which all others are related,
    if there is one.
    """

    title: str
    unit: str
    sized: str
    note: str
    cases: Sequence[Any]
    case: type[Any]
    limit: type[Any]
    workload: type[Any]
    peers: ModuleType
    packages: tuple[str, ...]
    huge_pages: bool
    baseline: str = ""


EMBEDDING_BAG = Operator(
    title="Embedding bag",
    unit="GB/s",
    sized="Tables",
    note="""\
GB/s count the bytes of the rows read. The last-level cache holds {cache}: a table of less than twice that is partly
served from it. The limit is what a probe reads from the same rows, on 2 MiB pages, with nothing but prefetches and
loads; small or skewed cases stay in caches and the call itself counts, so their share of it says little.""",
    cases=cases.CASES,
    case=cases.Case,
    limit=probe.Limit,
    workload=cases.Workload,
    peers=peers,
    packages=("fbgemm_gpu-cpu", "torchrec"),
    huge_pages=True,
)
INT8_LINEAR = Operator(
    title="int8 linear layers and MLPs",
    unit="GOP/s",
    sized="int8 weights",
    note="""\
A case is named by rows x features in x features out. GOP/s count two operations for each weight and row. The limit is
what the CPU's int8 instructions do on registers. At one row reading the weights and the call itself count, so that the
share of it says little.""",
    cases=linear_cases.CASES,
    case=linear_cases.LinearCase,
    limit=probe.ProductLimit,
    workload=linear_cases.LinearWorkload,
    peers=linear_peers,
    packages=("onnxruntime", "torchao", "openvino"),
    huge_pages=False,
)
SPARSE_LINEAR = Operator(
    title="Sparse linear layers",
    unit="GFLOP/s",
    sized="Kept weights",
    note="""\
A case is named by its pattern, the share of weights that is pruned, and rows x features in x features out. GFLOP/s
count two operations for each kept weight and row (of training three times as many). The limit is what the CPU's
multiply-add instructions do on registers, of int8 or float32. At few rows reading the weights and the call itself
count, so that the share of it says little. Sparse products of torch and scipy are spared the copies that would turn
activations and outputs. Training is forward and backward, with the gradients of input, weights and bias.""",
    cases=sparse_cases.CASES,
    case=sparse_cases.SparseCase,
    limit=probe.ProductLimit,
    workload=sparse_cases.SparseWorkload,
    peers=sparse_peers,
    packages=("scipy",),
    huge_pages=False,
    baseline=sparse_cases.DENSE,
)
ALL = (EMBEDDING_BAG, INT8_LINEAR, SPARSE_LINEAR)
CASES = tuple(case for operator in ALL for case in operator.cases)


def of(case: Any) -> Operator:
    """The operator that a case belongs to."""
    return next(operator for operator in ALL if isinstance(case, operator.case))
