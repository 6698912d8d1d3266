"""``optimize``: a copy of any model with its layers swapped for smaller ones, and a report of what was done."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ...ops.linear.sparse import SparseLinear
from ..converters.int8 import LinearConverter, Range, leave_noisy, leave_slow
from ..converters.sparse import SCHEMES as SPARSE
from ..converters.sparse import SparseConverter, leave_dense
from ..converters.tables import Converter, TableConverter, stored_bytes
from .masked import without_masks
from .plan import Layer, Plan, Skip, dtype_name
from .report import LayerSwap, OptimizeReport
from .trial_run import call


def optimize(
    model: torch.nn.Module,
    embedding: str | None = "int8",
    skip: Skip | Iterable[Skip] = (),
    *,
    linear: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    sample_inputs: Any = None,
    ranges: Mapping[str, Range] | None = None,
    min_sqnr: float | None = None,
    batch_size: int | None = None,
) -> tuple[torch.nn.Module, OptimizeReport]:
    """A copy of a model, for inference, with smaller layers; the model itself is not changed.

    Works on any module: layers may sit anywhere in it, be used at several places (they stay one layer), share their
    weight among each other (they share the new one), or be the model itself. Float tables that are swapped are not
    copied on the way; everything else is a deep copy, in the mode (train or eval) of the original. A layer whose new
    form could not do the same stays as it is, and the report says why: ``max_norm``, a weight that something else
    uses as well (tied to a ``Linear``), masked and parametrized weights, subclasses with a ``forward`` of their own,
    values that are not finite, tables so narrow that scales and biases would cost more than they save, the layers
    inside of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, which read their weights.

    A layer's weight may also be read directly by the model's code (``user @ self.items.weight.T``), which no swapped
    layer can serve. Such layers stay as they are. They are found in the source of the model's methods, constructors
    aside, through attributes, containers and local names; where it does not tell which layer's weight is read, all that
    it may be stay. With ``sample_inputs`` a trial run decides instead: it
    sees every read on the way that those inputs take, however it is made, and compares the outputs; what only other
    code reads (a training loss, a branch not taken) is swapped, with a note in the report. Give them whenever you
    can; name in ``skip`` what still is not to be swapped.

    Linear layers that follow each other in a ``nn.Sequential`` become one :class:`~recsys_kernels.Int8MLP`, with the
    ReLU, GELU, Sigmoid or SiLU after each folded in and Dropout left out; that takes the place of the Sequential, or of
    these modules in it. Where hooks, other code (``for layer in self.mlp:``) or other places need the modules one by
    one, each linear layer is swapped for an :class:`~recsys_kernels.Int8Linear` by itself. With ``linear="sparse"``
    each becomes a :class:`~recsys_kernels.SparseLinear` with the function after it folded in, at its place in the
    Sequential; if nothing else is in that, it becomes a :class:`~recsys_kernels.SparseMLP`. Layers that were pruned
    (:func:`~recsys_kernels.prune`, :class:`~recsys_kernels.Pruner`, ``torch.nn.utils.prune``), with a mask or without
    one, are taken as they are.

    Args:
        model: any module, on any device. Optimizers that it holds in attributes become None in the copy. Weights of
            swapped layers that it also holds in plain attributes (say, in a list for a penalty) become NaN there, of
            the same shape but a single number in memory: no float table is kept alive, and no use goes unnoticed.
        embedding: rows of ``nn.Embedding``, ``nn.EmbeddingBag``, ``rk.EmbeddingBag`` and the tables of
            ``rk.EmbeddingBagCollection``: ``"int8"``, ``"int4"``, or None to leave them.
        skip: layers to leave: names (``"encoder.items"``), glob patterns (``"linear.*"``), module classes. What is
            inside a named module is left, too.
        linear: ``nn.Linear``: ``"int8"`` (activations quantized row by row, as they come), ``"int8-static"`` (by
            ``ranges``), ``"int8-weight-only"`` (activations in float), ``"sparse"`` (only the weights that are not
            dropped), ``"int8+sparse"`` and ``"int8-static+sparse"`` (these in int8), or None to leave them. A layer
            that is known to be faster dense on this machine (``recsys_kernels.doctor()``) stays dense, in float or
            int8 and with the weights that it has; one that gets no smaller is swapped only if measured to be faster.
        sparsity: for ``"sparse"`` and the like: share of the weights of each layer to drop, those with the lowest
            magnitudes, without any training. None: those that are zero.
        pattern: for these: ``"unstructured"`` (default), ``"block4x1"`` and other blocks, ``"2:4"``; see
            :func:`~recsys_kernels.prune`.
        sample_inputs: arguments of a call, as a tuple (anything else is the only argument). The model and the new
            one are run on them in eval mode, without gradients and from the same random state. Linear layers are
            measured on what they get in this run (its first 512 rows), noise and speed.
        ranges: for ``"int8-static"`` (also sparse): range of the input of each linear layer by its name, from
            :func:`~recsys_kernels.calibrate`. A layer that is not in it stays in float.
        min_sqnr: signal-to-quantization-noise ratio in dB under which a linear layer stays in float: the power of its
            output over that of the difference that its new form makes, for the same input. Needs ``sample_inputs``;
            default 20, but none for layers that ``sparsity`` prunes.
        batch_size: examples a call for which linear layers are timed as they are and in their new form, with the
            threads that torch has now; they stay as they are where that is faster. Default: the first dimension of the
            first tensor of ``sample_inputs``. Without these each gets one random row an example; without both nothing
            is measured.

    Returns:
        The new model, and the report: print it, or see :class:`~recsys_kernels.compress.rewrite.report.OptimizeReport`.

    Raises:
        ValueError: no such choice; a name that no module of the model has; an option without what it needs.
        TypeError: ``model`` is not a module, or an entry of ``skip`` is neither a name nor a module class.
        RuntimeError: the new model fails on ``sample_inputs``, or its outputs have other shapes.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    _check(linear, sample_inputs, ranges, min_sqnr, batch_size)
    _check_pruning(linear, sparsity, pattern)
    plain, masked, notes = without_masks(model) if linear in SPARSE else (model, {}, [])
    wanted = ((TableConverter(), embedding), (_linear_converter(plain, linear, sparsity, pattern, ranges), linear))
    plan = Plan(plain, _chosen(wanted), masked)
    plan.leave_skipped(skip)
    plan.leave_tied()
    expected = plan.leave_read(sample_inputs)
    plan.leave_tied()  # once more: a read of one layer's weight is one of all that share it
    plan.convert()
    if linear is not None:
        _leave_worse(plan, sample_inputs is not None, min_sqnr, batch_size)
    new = plan.build()
    plan.notes += notes
    error = None if sample_inputs is None else _output_error(expected, _try(plan, new, sample_inputs))
    return new, _report(plan, model, new, error)


def _leave_worse(plan: Plan, sampled: bool, min_sqnr: float | None, batch_size: int | None) -> None:
    """Keeps linear layers whose new form is not good or fast enough, as far as that can be told."""
    timed = sampled or batch_size is not None
    leave_dense(plan, batch_size, timed)
    plan.leave_tied()
    if sampled:
        leave_noisy(plan, min_sqnr)
        plan.leave_tied()
    if timed:
        leave_slow(plan, batch_size)
        plan.leave_tied()


def _check(
    linear: str | None,
    sample_inputs: Any,
    ranges: Mapping[str, Range] | None,
    min_sqnr: float | None,
    batch_size: int | None,
) -> None:
    """Whether options that need each other are there."""
    static = linear in ("int8-static", "int8-static+sparse")
    if static and ranges is None:
        raise ValueError(f"linear={linear!r} needs ranges=rk.calibrate(model, batches)")
    if ranges is not None and not static:
        raise ValueError(f"ranges is for linear='int8-static', but linear is {linear!r}")
    if min_sqnr is not None and (linear is None or sample_inputs is None):
        raise ValueError("min_sqnr needs linear and sample_inputs, on which the noise is measured")
    if batch_size is not None and (linear is None or batch_size < 1):
        raise ValueError(f"batch_size must be at least 1, and needs linear, but is {batch_size} with linear={linear!r}")


def _check_pruning(linear: str | None, sparsity: float | None, pattern: str | None) -> None:
    """Whether options of sparse layers are given for sparse layers."""
    for name, value in (("sparsity", sparsity), ("pattern", pattern)):
        if value is not None and linear not in SPARSE:
            known = ", ".join(map(repr, SPARSE))
            raise ValueError(f"{name} is for linear={known}, but linear is {linear!r}")


def _linear_converter(
    model: torch.nn.Module,
    linear: str | None,
    sparsity: float | None,
    pattern: str | None,
    ranges: Mapping[str, Range] | None,
) -> LinearConverter:
    by_layer = None
    if ranges is not None:
        modules = dict(model.named_modules(remove_duplicate=False))
        unknown = sorted(name for name in ranges if name not in modules)
        if unknown:
            raise ValueError(f"ranges: {unknown[0]!r} names no module of the model")
        by_layer = {id(modules[name]): given for name, given in ranges.items()}
    if linear not in SPARSE:
        return LinearConverter(by_layer)
    return SparseConverter(sparsity, "unstructured" if pattern is None else pattern, by_layer)


def _chosen(wanted: Iterable[tuple[Converter, str | None]]) -> list[tuple[Converter, str]]:
    for converter, choice in wanted:
        if choice is not None and choice not in converter.choices:
            choices = [*converter.choices, *(SPARSE if converter.option == "linear" else ())]
            raise ValueError(f"{converter.option} must be {', '.join(map(repr, choices))} or None, but is {choice!r}")
    return [(converter, choice) for converter, choice in wanted if choice is not None]


# ---- the report ----------------------------------------------------------------------------------------------------


def _report(plan: Plan, model: torch.nn.Module, new: torch.nn.Module, output_error: float | None) -> OptimizeReport:
    order = {key: number for number, key in enumerate((*plan.modules, *plan.unregistered))}
    return OptimizeReport(
        layers=tuple(_describe(plan.layers[key], plan.masked) for key in sorted(plan.layers, key=order.__getitem__)),
        bytes_before=stored_bytes(model),
        bytes_after=stored_bytes(new),
        output_error=output_error,
        notes=tuple(dict.fromkeys(plan.notes)),
    )


def _describe(layer: Layer, masked: Mapping[int, torch.nn.Module]) -> LayerSwap:
    module, given = layer.module, masked.get(id(layer.module), layer.module)
    tensors = [*given.parameters(), *given.buffers()]
    before = sum(tensor.nbytes for tensor in tensors if not is_lazy(tensor))
    error = relative = None
    if layer.new is not None:
        error = layer.converter.max_error(module, layer.new)
        largest = max(abs(value.item()) for value in module.weight.detach().aminmax())
        relative = error / largest if largest else 0.0
    return LayerSwap(
        names=tuple(layer.names),
        kind=type(module).__name__,
        action="kept" if layer.new is None else layer.choice,
        reason=layer.keep or "; ".join(layer.notes),
        shape=layer.converter.shape(module),
        dtype=dtype_name(tensors[0]) if tensors else "",
        bytes_before=before,
        bytes_after=before if layer.new is None else stored_bytes(layer.new),
        max_error=error,
        relative_error=relative,
        sqnr=layer.sqnr,
        float_us=layer.float_us,
        int8_us=layer.new_us,
        sparsity=layer.new.sparsity if isinstance(layer.new, SparseLinear) else None,
        pattern=layer.converter.pattern.name if isinstance(layer.new, SparseLinear) else None,  # type: ignore[attr-defined]
    )


# ---- the trial run of the new model --------------------------------------------------------------------------------


def _try(plan: Plan, new: torch.nn.Module, sample_inputs: Any) -> Any:
    """Outputs of a new model, which stays as it is."""
    buffers = {id(tensor): tensor for layer in plan.swapped for tensor in layer.new.buffers()}
    twin = copy.deepcopy(new, dict(buffers))
    try:
        return call(twin, sample_inputs)
    except Exception as error:
        raise RuntimeError(
            "the optimized model fails on sample_inputs, the given one does not; name the layer that it cannot do "
            f"without in skip ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


def _output_error(expected: Any, outputs: Any) -> float:
    """The largest absolute difference between floating-point outputs; infinity where only one of them is finite."""
    pairs = [
        [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)] for tree in (expected, outputs)
    ]
    shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in pairs]
    if shapes[0] != shapes[1]:
        raise RuntimeError(f"outputs of the optimized model have the shapes {shapes[1]} instead of {shapes[0]}")
    worst = 0.0
    for one, other in zip(*pairs, strict=True):
        if one.is_floating_point() and one.numel():
            same = (one == other) | (one.isnan() & other.isnan())
            difference = (one.double() - other.double()).abs().masked_fill(same, 0.0)
            worst = max(worst, difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item())
    return worst
