"""Small cases of every family, with their workloads and our sides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from bench.core.cases import BenchCase
from bench.core.families import Workload, family_of
from bench.core.sides import Side
from bench.ops.embedding_bag.cases import EmbeddingBagCase
from bench.ops.linear.int8.cases import Int8LinearCase
from bench.ops.linear.sparse.cases import SparseLinearCase

FLOAT, QUANTIZED = (EmbeddingBagCase(dtype, 64, 64, 20).resized(None, quick=True) for dtype in ("fp32", "int8"))
LINEAR, MLP = Int8LinearCase(7, (45, 33)), Int8LinearCase(5, (45, 33, 17, 1), level="module")
SPARSE = SparseLinearCase(7, 64, 48, 0.8, "block4x1")
SPARSE_INT8 = SparseLinearCase(7, 64, 48, 0.8, "block4x4", "int8")
SPARSE_TRAINING = replace(SPARSE, kind="training")


def ready(case: BenchCase) -> tuple[Any, Side]:
    """The workload of a case and our side."""
    family = family_of(case)
    work: Workload = family.workload(case, True)
    return work, family.peers.ours(work)
