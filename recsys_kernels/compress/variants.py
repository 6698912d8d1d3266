"""The compressed forms that the main job compares: one entry a variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recsys_kernels.models.dlrm import DLRM
from recsys_kernels.ops.int8_matmul import Int8MLP

from .calibrate import observe
from .linear import Range

# How static ranges are found, see `rk.calibrate`.
METHOD = "mse"


@dataclass(frozen=True)
class Material:
    """What variants are made with, beside the trained model.

    Attributes:
        inputs: arguments of calls of the model, to find the ranges of static layers on.
        tune: trains a model with MLPs in quantization-aware training in place, given the trained model, too; None
            leaves it as it is.
    """

    inputs: Sequence[tuple[Any, ...]]
    tune: Callable[[DLRM, DLRM], None] | None = None


@dataclass(frozen=True)
class Variant:
    """One form of the trained model.

    Attributes:
        name: short name, for `--save` and the JSON.
        title: what a reader of the report sees.
        tables: type of the tables' rows: "float32", "int8" or "int4".
        make: the trained model and the material -> the form to measure; the model is left as it was.
    """

    name: str
    title: str
    tables: str
    make: Callable[[DLRM, Material], DLRM]


def _dynamic(model: DLRM, bits: int) -> DLRM:
    small = model.quantize(bits)
    return small.with_mlps([Int8MLP.from_float(mlp) for mlp in _mlps(small)], "int8")


def _static(model: DLRM, material: Material) -> DLRM:
    small = model.quantize(8)
    ranges = _ranges(small, material)
    new = [
        Int8MLP.from_float(mlp, "static", input_ranges=known) for mlp, known in zip(_mlps(small), ranges, strict=True)
    ]
    return small.with_mlps(new, "int8-static")


def _trained(model: DLRM, material: Material) -> DLRM:
    """The static form, of MLPs that were trained a little more as what they will be; the tables are 8-bit ones then."""
    small = model.quantize(8)
    ranges = _ranges(small, material)
    mlps = [
        Int8MLP.qat(mlp, "static", ranges="learnable", input_ranges=known)
        for mlp, known in zip(_mlps(small), ranges, strict=True)
    ]
    training = small.with_mlps(mlps, "int8-static")
    if material.tune is not None:
        material.tune(training, model)
    return training.with_mlps([mlp.convert() for mlp in mlps], "int8-static")


def _mlps(model: DLRM) -> tuple[nn.Sequential, nn.Sequential]:
    bottom, top = model.head.bottom, model.head.top
    assert isinstance(bottom, nn.Sequential)
    assert isinstance(top, nn.Sequential)
    return bottom, top


def _ranges(model: DLRM, material: Material) -> list[list[Range]]:
    """The range of the input of each layer of both MLPs."""
    names = [[name for name, m in mlp.named_modules() if isinstance(m, nn.Linear)] for mlp in _mlps(model)]
    keys = [[f"head.{part}.{name}" for name in layers] for part, layers in zip(("bottom", "top"), names, strict=True)]
    layers = {name: model.get_submodule(name) for part in keys for name in part}
    found = observe(model, layers, material.inputs, METHOD, progress=False)
    return [[found[name] for name in part] for part in keys]


BASELINE = "torch"  # the same weights on plain torch modules
BASELINE_TITLE = "plain torch"
VARIANTS = (
    Variant("fp32", "32-bit tables", "float32", lambda model, material: model),
    Variant("int8", "8-bit tables", "int8", lambda model, material: model.quantize(8)),
    Variant("int4", "4-bit tables", "int4", lambda model, material: model.quantize(4)),
    Variant("int8-mlp", "8-bit, MLP dynamic", "int8", lambda model, material: _dynamic(model, 8)),
    Variant("int8-mlp-static", "8-bit, MLP static", "int8", _static),
    Variant("int8-mlp-qat", "8-bit, MLP QAT", "int8", _trained),
    Variant("int4-mlp", "4-bit, MLP dynamic", "int4", lambda model, material: _dynamic(model, 4)),
)
