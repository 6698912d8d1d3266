"""The compressed forms that the main job compares: one entry a variant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from recsys_kernels.models.dlrm import DLRM


@dataclass(frozen=True)
class Variant:
    """One form of the trained model.

    Attributes:
        name: short name, for `--variant` and the JSON.
        title: what a reader of the report sees.
        make: the trained model -> the form to measure; the argument is left as it was.
    """

    name: str
    title: str
    make: Callable[[DLRM], DLRM]


BASELINE = "torch"  # the same weights on plain torch modules
BASELINE_TITLE = "plain torch"
VARIANTS = (
    Variant("fp32", "32-bit tables", lambda model: model),
    Variant("int8", "8-bit tables", lambda model: model.quantize(8)),
    Variant("int4", "4-bit tables", lambda model: model.quantize(4)),
)
