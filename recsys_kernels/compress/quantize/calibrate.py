"""The ranges of the inputs of linear layers, observed on batches: static int8 layers quantize by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ..rewrite.plan import RewritePlan, Skip, plan_replacements
from ..rewrite.without_masks import without_masks

Range = tuple[float, float]

METHODS = ("minmax", "percentile", "mse")

# Bins from -reach to reach. The reach is a power of two, less than twice the largest value: at least 8 bins a step of
# 256 steps.
_BINS = 8192
# Values counted at a time; float32 counts are exact up to 2^24.
_BLOCK = 1 << 22
# The method "mse" tries ends at this many fractions of the largest and the smallest value.
_FRACTIONS = 64


def calibrate(
    model: torch.nn.Module,
    batches: Iterable[Any],
    method: str = "minmax",
    *,
    percentile: float = 99.99,
    skip: Skip | Iterable[Skip] = (),
    progress: bool | None = None,
) -> dict[str, Range]:
    """Ranges for the inputs of a model's linear layers, by name, from their inputs on some batches.

    The model runs on every batch in eval mode and without gradients, and is left as it was. The memory for each layer
    does not grow with the batches: a minimum, a maximum and, but for ``"minmax"``, a histogram.

    Example:
        >>> ranges = rk.calibrate(model, (x for x, _ in loader), "mse")            # doctest: +SKIP
        >>> small, report = rk.optimize(model, linear="int8-static", ranges=ranges)  # doctest: +SKIP

    Args:
        model: any float model. The layers are those that ``optimize(model, linear="int8-static")`` would swap, and
            those with pruning masks, which ``linear="int8-static+sparse"`` swaps.
        batches: arguments of one call each, as a tuple (anything else is the only argument).
        method: ``"minmax"``: everything that was seen. ``"percentile"``: both ends clipped (Wu et al., "Integer
            Quantization for Deep Learning Inference: Principles and Empirical Evaluation", 2020). ``"mse"``: the ends
            that make the squared error of the quantized values smallest.
        percentile: for ``"percentile"``: percent of the values that lie below the upper end, and above the lower one.
        skip: layers to leave out, as for ``optimize``.
        progress: whether to show a progress bar (tqdm, if it is installed); default: on a terminal.

    Returns:
        (low, high) by the name of each layer. One that got nothing but zeros has (0, 1).

    Raises:
        ValueError: an unknown method; a percentile that is not above 50 and at most 100; no batches; no linear layer;
            an input with NaN or infinity (layer and batch are named).
        RuntimeError: layers that no batch reached; they are named, and can be left out with ``skip``.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, but is {method!r}")
    if not 50.0 < percentile <= 100.0:
        raise ValueError(f"percentile must be above 50 and at most 100, but is {percentile}")
    _check_model(model)
    plain, masked, _ = without_masks(model)
    layers = {layer.names[0]: masked.get(id(layer.module), layer.module) for layer in plan_of(plain, skip).replaced}
    return observe(model, layers, batches, method, percentile / 100.0, progress)


def observe(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    batches: Iterable[Any],
    method: str,
    share: float = 1.0,
    progress: bool | None = None,
) -> dict[str, Range]:
    """:func:`calibrate` for given layers of the model."""
    observers = {name: Observer(method != "minmax") for name in layers}
    watch(model, layers, batches, {name: observer.add for name, observer in observers.items()}, progress)
    missed = [name for name, observer in observers.items() if not observer.seen]
    if missed:
        raise RuntimeError(f"no batch reached {', '.join(map(repr, missed))}; name what is not used in skip")
    return {name: observer.range(method, share) for name, observer in observers.items()}


def plan_of(model: torch.nn.Module, skip: Skip | Iterable[Skip]) -> RewritePlan:
    """The plan of a model whose linear layers become static ones.

    Raises:
        ValueError: the model has no such layer.
    """
    _check_model(model)
    plan = plan_replacements(model, "linear", "int8-static", skip)
    if not plan.replaced:
        raise ValueError("the model has no linear layer that can be swapped; see the report of optimize(linear='int8')")
    return plan


def _check_model(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, but is {type(model).__name__}")


def watch(
    model: torch.nn.Module,
    layers: Mapping[str, torch.nn.Module],
    batches: Iterable[Any],
    notes: Mapping[str, Callable[[torch.Tensor], None]],
    progress: bool | None,
) -> None:
    """Runs a model on batches and shows the inputs of its layers: finite float32 values [rows, in_features].

    Raises:
        ValueError: no batches; NaN or infinity.
    """
    modes = [(module, module.training) for module in model.modules()]
    number = -1  # the number of the batch that runs

    def hook(name: str, note: Callable[[torch.Tensor], None]) -> Any:
        def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = (args[0] if args else kwargs["input"]).detach()
            if rows.numel():
                if not torch.isfinite(rows).all():
                    raise ValueError(f"batch {number}: the input of {name!r} holds NaN or infinity")
                note(rows.float().reshape(-1, rows.shape[-1]))

        return see

    with ExitStack() as stack, torch.no_grad():
        for name, layer in layers.items():
            handle = layer.register_forward_pre_hook(hook(name, notes[name]), with_kwargs=True)
            stack.callback(handle.remove)
        stack.callback(_restore, modes)
        model.eval()
        for batch in _with_bar(batches, progress):
            number += 1
            model(*(batch if isinstance(batch, tuple) else (batch,)))
    if number < 0:
        raise ValueError("batches is empty")


def _restore(modes: Iterable[tuple[torch.nn.Module, bool]]) -> None:
    for module, training in modes:
        module.training = training


def _with_bar(batches: Iterable[Any], progress: bool | None) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # a progress bar does not justify a required package
        return batches
    return tqdm(batches, desc="calibrating", unit="batch", disable=None if progress is None else not progress)


class Observer:
    """The range of one layer's input so far, in memory that does not grow.

    Attributes:
        seen: whether the layer got any input.
        low, high: smallest and largest value.
    """

    def __init__(self, with_histogram: bool) -> None:
        self.seen = False
        self.low, self.high = math.inf, -math.inf
        self._counts = torch.zeros(_BINS if with_histogram else 0, dtype=torch.float64)
        self._reach = 0.0  # the end of the histogram, a power of two; 0 until a value is not 0

    def add(self, rows: torch.Tensor) -> None:
        """Adds finite float32 values to the range and the histogram."""
        low, high = (end.item() for end in rows.aminmax())
        self.seen = True
        self.low, self.high = min(self.low, low), max(self.high, high)
        if not len(self._counts):
            return
        self._stretch(max(-low, high))
        if self._reach == 0.0:
            self._counts[_BINS // 2] += rows.numel()
            return
        # The division is in two steps, since float32 cannot hold the reach of the largest values.
        half = 2.0 ** (math.frexp(self._reach)[1] // 2)
        for block in rows.reshape(-1).split(_BLOCK):
            self._counts += torch.histc(block / half / (self._reach / half), _BINS, -1.0, 1.0).cpu()

    def _stretch(self, largest: float) -> None:
        """Widens the histogram until it reaches a value; each step merges two bins into one."""
        if largest == 0.0:
            return
        wanted = 2.0 ** math.ceil(math.log2(largest))
        if self._reach == 0.0:
            self._reach = wanted
        while self._reach < wanted:
            pairs = self._counts.reshape(-1, 2).sum(1)
            self._counts = torch.zeros_like(self._counts)
            self._counts[_BINS // 4 : _BINS // 4 + len(pairs)] = pairs
            self._reach *= 2.0

    def range(self, method: str, share: float) -> Range:
        """The range by a method; it contains 0 if it would otherwise be a single number."""
        low, high = self.low, self.high
        if low == high == 0.0:
            return 0.0, 1.0
        if low < high and method == "percentile":
            low, high = max(low, -self._quantile(share, -1)), min(high, self._quantile(share, 1))
        elif low < high and method == "mse":
            low, high = self._best()
        return (low, high) if low < high else (min(low, 0.0), max(high, 0.0))

    def _quantile(self, share: float, sign: int) -> float:
        """The value that a share of the values, times the sign, do not exceed, linear within a bin."""
        counts = self._counts if sign > 0 else self._counts.flip(0)
        sums = counts.cumsum(0)
        wanted = share * sums[-1].item()
        at = min(int(torch.searchsorted(sums, wanted)), _BINS - 1)
        inside = (wanted - (sums[at] - counts[at]).item()) / max(counts[at].item(), 1.0)
        return self._reach * (2.0 * (at + inside) / _BINS - 1.0)

    def _best(self) -> Range:
        """The ends with the smallest squared error, one searched for after the other, twice."""
        used = self._counts.nonzero().squeeze(1)
        centers = self._reach * (2.0 * (used.double() + 0.5) / _BINS - 1.0)
        counts = self._counts[used]
        bottom, top = min(self.low, 0.0), max(self.high, 0.0)
        fractions = torch.arange(1, _FRACTIONS + 1, dtype=torch.float64) / _FRACTIONS
        low, high = torch.tensor(bottom, dtype=torch.float64), torch.tensor(top, dtype=torch.float64)
        for _ in range(2):
            highs = fractions * top
            high = highs[_errors(centers, counts, low.expand_as(highs), highs).argmin()]
            lows = fractions * bottom
            low = lows[_errors(centers, counts, lows, high.expand_as(lows)).argmin()]
        return low.item(), high.item()


def _errors(centers: torch.Tensor, counts: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
    """The sum of squared errors of values quantized to each of some ranges."""
    scale = ((highs - lows) / 255.0).clamp(min=2.0**-126).unsqueeze(1)
    zero_point = torch.round(-lows.unsqueeze(1) / scale)
    q = torch.round(centers / scale).clamp(min=-zero_point, max=255.0 - zero_point)
    return ((q * scale - centers).square() * counts).sum(1)
