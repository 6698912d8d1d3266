"""The benchmarks of int8 linear layers and MLPs."""

from bench.core.families import Family, register
from bench.core.probe import ProductLimit
from bench.ops.linear.int8 import peers
from bench.ops.linear.int8.cases import CASES, Int8LinearCase, Int8LinearWorkload

register(
    Family(
        name=Int8LinearCase.family,
        title="int8 linear layers and MLPs",
        unit="GOP/s",
        size_label="int8 weights",
        note="""\
A case is named by rows x features in x features out. GOP/s count two operations for each weight and row. The limit is
what the CPU's int8 instructions do on registers. At one row, reading the weights and the call itself take the time, so
the share of the limit says little.""",
        cases=CASES,
        case_type=Int8LinearCase,
        limit_type=ProductLimit,
        workload=Int8LinearWorkload,
        peers=peers,
        plot=f"{__name__}.plot",
        packages=("onnxruntime", "torchao", "openvino"),
    )
)
