"""What ``doctor`` tells about sparse layers: from which share of zeros on they run sparse on the CPU."""

from __future__ import annotations

from ....backends.registry import Facts, native
from .crossover import CROSSOVER, FEW_ROWS

_HEADING = (
    f"{'':<26}run dense where fewer of their weights are zero (int8: of their fours of columns),",
    f"{'':<26}with up to {FEW_ROWS} rows of input and with more; output rows that share their columns:",
)


def _runs_dense() -> dict[str, dict[str, tuple[float, float]]]:
    """The sparsity below which a layer is faster as a dense one on the CPU."""
    level = native.isa()
    kinds = {} if level is None else CROSSOVER[level]
    return {
        kind: {
            f"{group} row{'s' * (group > 1)}": (round(1 - few, 3), round(1 - many, 3))
            for group, (few, many) in limits.items()
        }
        for kind, limits in kinds.items()
    }


def _share(zeros: float) -> str:
    return f"{zeros:.0%}" if zeros else "never"


def facts() -> Facts:
    """``sparse_runs_dense``: by the type of the weights and by the output rows that share their columns."""
    dense = _runs_dense()
    lines = [
        f"{'' if number else 'sparse layers':<26}{kind:<18}"
        + ", ".join(f"{group}: {_share(few)} and {_share(many)}" for group, (few, many) in limits.items())
        for number, (kind, limits) in enumerate(dense.items())
    ]
    return Facts({"sparse_runs_dense": dense}, notes=("", *_HEADING, *lines) if lines else ())
