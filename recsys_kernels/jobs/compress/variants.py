"""The compressed forms that the main job compares: one entry a variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from recsys_kernels.models.dlrm import DLRM, layer_pattern
from recsys_kernels.ops.linear.int8 import Int8MLP
from recsys_kernels.ops.linear.sparse import SparseLinear, SparseMLP
from recsys_kernels.ops.linear.sparse.formats import stored_pattern
from recsys_kernels.ops.linear.sparse.patterns import parse_pattern

from ...compress.prune.masks import prune, remove_masks
from ...compress.quantize.calibrate import Range, observe

# How static ranges are found, see `rk.calibrate`.
METHOD = "mse"
# The share and the pattern of pruned MLPs. In a block one column index serves four weights, so that int8 layers get
# smaller, too.
SPARSITY, PATTERN = 0.8, "block4x1"


@dataclass(frozen=True)
class Material:
    """The inputs from which variants are made, beside the trained model.

    Attributes:
        inputs: arguments of calls of the model, to find the ranges of static layers on.
        tune: trains a model with MLPs in quantization-aware training in place, given the trained model, too; None
            leaves it as it is.
        pruned: the trained model -> one with 8-bit tables and zeros in its MLPs, pruned while they were trained more;
            None prunes at once and without training.
        sparsity, pattern: what is dropped then, see `rk.prune`; None: what the pattern fixes, or `SPARSITY`.
    """

    inputs: Sequence[tuple[Any, ...]]
    tune: Callable[[DLRM, DLRM], None] | None = None
    pruned: Callable[[DLRM], DLRM] | None = None
    sparsity: float | None = None
    pattern: str = PATTERN


@dataclass(frozen=True)
class Variant:
    """One form of the trained model.

    Attributes:
        name: short name, for `--save` and the JSON.
        title: what a reader of the report sees.
        tables: type of the tables' rows: "float32", "int8" or "int4".
        make: the trained model and the material -> the form to measure; the model is left as it was.
        pruned: whether weights of the MLPs were dropped.
    """

    name: str
    title: str
    tables: str
    make: Callable[[DLRM, Material], DLRM]
    pruned: bool = False


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


def _sparse(model: DLRM, material: Material, int8: bool) -> DLRM:
    """Pruned MLPs, in 8 bits or not; the tables are 8-bit ones."""
    if material.pruned is not None:
        small = material.pruned(model)
    else:
        small = model.quantize(8)
        prune(small.head, **prune_options(small, material.sparsity, material.pattern))
        remove_masks(small.head)
    mlps = [_sparse_mlp(mlp, material.pattern, int8) for mlp in _mlps(small)]
    pattern = stored_pattern(parse_pattern(material.pattern)).name
    return small.with_mlps(mlps, "int8+sparse" if int8 else "sparse", pattern)


def _sparse_mlp(mlp: nn.Sequential, pattern: str, int8: bool) -> SparseMLP:
    modules = [module for module in mlp if not isinstance(module, nn.Dropout)]
    layers = []
    for module, after in zip(modules, [*modules[1:], None], strict=True):
        if isinstance(module, nn.Linear):
            stored_as = layer_pattern(module.out_features, pattern)
            epilogue = "relu" if isinstance(after, nn.ReLU) else None
            layer = SparseLinear.from_dense(module, None, stored_as, epilogue=epilogue)
            layers.append(layer.quantize() if int8 else layer)
    return SparseMLP(*layers)


def prune_options(model: DLRM, sparsity: float | None, pattern: str) -> dict[str, Any]:
    """Arguments of `rk.prune` and `rk.Pruner` for the head of a model; layers of one output stay dense.

    The share is that of all layers together, where the pattern leaves a choice: a layer of few inputs keeps more.
    """
    fixed = parse_pattern(pattern).sparsity
    single = {name: 0.0 for name, m in model.head.named_modules() if isinstance(m, nn.Linear) and m.out_features == 1}
    return {
        "sparsity": share_of(sparsity, pattern),
        "pattern": pattern,
        "scope": "global" if fixed is None else "layer",
        "amounts": single,
    }


def share_of(sparsity: float | None, pattern: str) -> float:
    """The share of weights that is dropped."""
    if sparsity is not None:
        return sparsity
    fixed = parse_pattern(pattern).sparsity
    return SPARSITY if fixed is None else fixed


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
    Variant("pruned", "8-bit, MLP pruned", "int8", lambda model, material: _sparse(model, material, False), True),
    Variant(
        "int8-pruned", "8-bit, MLP pruned int8", "int8", lambda model, material: _sparse(model, material, True), True
    ),
    Variant("int4-mlp", "4-bit, MLP dynamic", "int4", lambda model, material: _dynamic(model, 4)),
)
