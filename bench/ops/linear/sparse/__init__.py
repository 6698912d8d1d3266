"""The benchmarks of sparse linear layers."""

from bench.core.families import Family, register
from bench.core.probe import ProductLimit
from bench.ops.linear.sparse import peers
from bench.ops.linear.sparse.cases import CASES, DENSE, SparseLinearCase, SparseLinearWorkload

register(
    Family(
        name=SparseLinearCase.family,
        title="Sparse linear layers",
        unit="GFLOP/s",
        size_label="Kept weights",
        note="""\
A case is named by its pattern, the share of weights that is pruned, and rows x features in x features out. GFLOP/s
count two operations for each kept weight and row (training: three times as many). The limit is what the CPU's
multiply-add instructions do on registers, with int8 or float32. At few rows, reading the weights and the call itself
take the time, so the share of the limit says little. The sparse products of torch and scipy are spared the copies that
would transpose activations and outputs. Training is forward and backward, with the gradients of input, weights and
bias.""",
        cases=CASES,
        case_type=SparseLinearCase,
        limit_type=ProductLimit,
        workload=SparseLinearWorkload,
        peers=peers,
        plot=f"{__name__}.plot",
        packages=("scipy",),
        baseline=DENSE,
    )
)
