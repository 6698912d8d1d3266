"""``optimize``: a copy of any model with its layers swapped for smaller ones, and a report of the changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..converters.converter import InputRange, Options, check_options, chosen_converters, converter_class
from .build import build
from .compare import compare
from .inspect.model_calls import Methods, model_calls
from .plan import RewritePlan, Skip
from .report import OptimizeReport, report_of
from .without_masks import without_masks


def optimize(
    model: torch.nn.Module,
    embedding: str | None = "int8",
    skip: Skip | Iterable[Skip] = (),
    *,
    linear: str | None = None,
    sparsity: float | None = None,
    pattern: str | None = None,
    sample_inputs: Any = None,
    ranges: Mapping[str, InputRange] | None = None,
    min_sqnr: float | None = None,
    batch_size: int | None = None,
    methods: Methods | None = None,
) -> tuple[torch.nn.Module, OptimizeReport]:
    """A copy of a model, for inference, with smaller layers; the model itself is not changed.

    Works on any module: layers may sit anywhere in it, be used at several places (they stay one layer), share their
    weight among each other (they share the new one), or be the model itself. Float tables that are swapped are not
    copied on the way; everything else is a deep copy, in the mode (train or eval) of the original. A layer whose new
    form could not do the same stays as it is, and the report says why: ``max_norm``, a weight that something else
    uses as well (tied to a ``Linear``), masked and parametrized weights, subclasses with a ``forward`` of their own,
    values that are not finite, tables so narrow that scales and biases would cost more than they save, the layers
    inside of ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer``, which read their weights.

    The model's own code may read the weight of a layer (``user @ self.items.weight.T``). A table with such a reader
    becomes a quantized table whose ``weight`` reads as floats: each read computes the floats from the stored rows,
    which costs time and, for a moment, memory; the report names the reader and the bytes. Writes to that ``weight``
    raise RuntimeError. A linear layer with such a reader stays as it is. The readers are found in the source of the
    model's methods, constructors aside. Calls with ``sample_inputs`` and ``methods`` show readers that the source does
    not show, and the outputs of the new model are compared with the model's own. A table whose parameter is read in
    another way than through ``layer.weight`` (from a list of parameters, say) stays as it is; only a call shows such a
    reader.

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
        skip: layers to leave: names (``"encoder.items"``), glob patterns (``"linear.*"``), module classes. Layers
            inside a named module are left, too.
        linear: ``nn.Linear``: ``"int8"`` (activations quantized row by row, as they come), ``"int8-static"`` (by
            ``ranges``), ``"int8-weight-only"`` (activations in float), ``"sparse"`` (only the weights that are not
            dropped), ``"int8+sparse"`` and ``"int8-static+sparse"`` (these in int8), or None to leave them. A layer
            that is known to be faster dense on this machine (``recsys_kernels.doctor()``) stays dense, in float or
            int8 and with the weights that it has; one that gets no smaller is swapped only if measured to be faster.
        sparsity: for ``"sparse"`` and the like: share of the weights of each layer to drop, those with the lowest
            magnitudes, without any training. None: those that are zero.
        pattern: for these: ``"unstructured"`` (default), ``"block4x1"`` and other blocks, ``"2:4"``; see
            :func:`~recsys_kernels.prune`.
        sample_inputs: arguments of a call, as a tuple (anything else is the only argument). Copies of the model and of
            the new one run on them in eval mode, without gradients and from the same random state, several times to
            measure the time of a call. Noise and speed of linear layers are measured on the first 512 rows that each
            layer gets, the speed of tables on the indices that each table gets.
        ranges: for ``"int8-static"`` (also sparse): range of the input of each linear layer by its name, from
            :func:`~recsys_kernels.calibrate`. A layer that is not in it stays in float.
        min_sqnr: signal-to-quantization-noise ratio in dB under which a linear layer stays in float: the power of its
            output over that of the difference that its new form makes, for the same input. Needs ``sample_inputs``;
            default 20, but none for layers that ``sparsity`` prunes.
        batch_size: examples a call for which layers are timed, in both forms, with the threads that torch has now. A
            linear layer stays in float where float is faster. A table becomes smaller even where its lookups become
            slower, since bytes are what tables are made small for; the report says slower or faster, with both times,
            and lists the slower ones (:attr:`OptimizeReport.slower`). Default: the first dimension of the first tensor
            of ``sample_inputs``. Without inputs each layer gets one random row or index an example; without both
            nothing is measured.
        methods: further calls that must work: names of methods that take ``sample_inputs``, functions of a model, or
            arguments by the names of methods (``{"full_sort_predict": interaction}``). Each call is made and compared
            as the one with ``sample_inputs`` is. Without it (None) any method may be called later, so a linear layer
            stays as it is if any method reads its weight, branches under ``if self.training`` aside; with it (an empty
            tuple will do) only the calls that are named have to work.

    Returns:
        The new model, and the report: print it, or see :class:`~recsys_kernels.compress.rewrite.report.OptimizeReport`.

    Raises:
        ValueError: no such choice; a name that no module or method of the model has; an option without the one that it
            needs.
        TypeError: ``model`` is not a module; an entry of ``skip`` or ``methods`` has another type; the model cannot be
            called with ``sample_inputs``.
        RuntimeError: the new model fails in one of the calls, or its outputs have other shapes.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, but is {batch_size}")
    calls = model_calls(model, sample_inputs, methods)
    choices = {"embedding": embedding, "linear": linear}
    options = Options(model, choices, sparsity, pattern, ranges, min_sqnr, batch_size, sampled=bool(calls))
    check_options(options)
    plan = _plan(options)
    plan.keep_skipped(skip)
    plan.keep_tied()
    expected = plan.keep_read(calls, other_methods=methods is None)
    plan.keep_tied()  # once more: a read of one layer's weight is one of all that share it
    plan.convert()
    plan.keep_unprofitable()
    new = build(plan)
    return new, report_of(plan, model, new, compare(plan, new, calls, expected) if calls else ())


def _plan(options: Options) -> RewritePlan:
    """The plan of a model, without the masks that a chosen converter takes off."""
    classes = [converter_class(option, choice) for option, choice in options.choices.items() if choice is not None]
    if not any(converter.takes_off_masks for converter in classes):
        return RewritePlan(options.model, chosen_converters(options))
    plain, masked, notes = without_masks(options.model)
    plan = RewritePlan(plain, chosen_converters(replace(options, model=plain)), masked)
    plan.notes += notes
    return plan
