"""The loss of a metric when each layer of a model is pruned by itself."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...ops.linear.sparse.patterns import check_sparsity, parse_pattern
from .layers import Choice, Target, aligned, find_layers
from .masks import choose_masks, scores_of

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
_TITLE = "pruning one layer at a time"


@dataclass(frozen=True)
class Sensitivity:
    """A metric for each layer pruned by itself: print it to read it.

    Attributes:
        baseline: the metric of the model as it is.
        sparsities: the sparsities that were tried, ascending.
        metrics: by the name of a layer, one value a sparsity.
        pattern: name of the sparsity pattern.
        higher_is_better: whether a higher metric is better.
    """

    baseline: float
    sparsities: tuple[float, ...]
    metrics: dict[str, tuple[float, ...]]
    pattern: str
    higher_is_better: bool = True

    def drops(self, name: str) -> tuple[float, ...]:
        """By how much the metric gets worse (less than 0: better) when a layer is pruned, one value a sparsity."""
        sign = 1.0 if self.higher_is_better else -1.0
        return tuple(sign * (self.baseline - value) for value in self.metrics[name])

    def amounts(self, max_drop: float) -> dict[str, float]:
        """Sparsity by the name of each layer, for ``amounts`` of :func:`~recsys_kernels.prune`.

        It is the highest up to which the metric is never worse by more than ``max_drop`` (in its own unit), 0 if none
        is. Layers that are pruned together add up what they lose: measure the whole.

        Raises:
            ValueError: ``max_drop`` is negative or NaN.
        """
        if not max_drop >= 0.0:
            raise ValueError(f"max_drop must be at least 0, but is {max_drop}")
        found = {}
        for name in self.metrics:
            best = 0.0
            for sparsity, drop in zip(self.sparsities, self.drops(name), strict=True):
                if not drop <= max_drop:  # `drop > max_drop` would accept a drop of NaN
                    break
                best = sparsity
            found[name] = best
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "baseline": self.baseline,
            "sparsities": list(self.sparsities),
            "metrics": {name: list(values) for name, values in self.metrics.items()},
            "pattern": self.pattern,
            "higher_is_better": self.higher_is_better,
        }

    def __str__(self) -> str:
        rows = [("layer", *(f"{100 * sparsity:g}%" for sparsity in self.sparsities), "")]
        for name, values in self.metrics.items():
            rows.append((name or "(the model)", *(f"{value:.5g}" for value in values), ""))
        better = "higher" if self.higher_is_better else "lower"
        note = f"pattern {self.pattern}, one layer at a time; as it is: {self.baseline:.5g} ({better} is better)"
        return "\n".join([*aligned(rows), note])


def sensitivity(
    model: torch.nn.Module,
    evaluate: Callable[[Any], float],
    sparsities: Iterable[float] = SPARSITIES,
    pattern: str = "unstructured",
    *,
    layers: Choice | Iterable[Choice] | None = None,
    higher_is_better: bool = True,
    progress: bool | None = None,
) -> Sensitivity:
    """Prunes one linear layer at a time, by magnitude, and measures what that does to a metric (Li et al., 2017).

    The model's weights are changed for the time of each measurement and put back bit for bit, also after an error.

    Example:
        >>> found = rk.sensitivity(model, lambda m: auc(m, validation))            # doctest: +SKIP
        >>> print(found)                                                           # doctest: +SKIP
        >>> rk.prune(model, amounts=found.amounts(max_drop=0.0005))                # doctest: +SKIP

    Args:
        model: any model with ``torch.nn.Linear`` layers. Layers that have a mask are pruned further.
        evaluate: the model -> the metric. It decides about eval mode and gradients.
        sparsities: shares of a layer's weights to drop, each 0 < sparsity < 1. An n:m pattern has only one, so that
            they are not used then.
        pattern, layers: see :func:`~recsys_kernels.prune`.
        higher_is_better: False for losses.
        progress: whether to show a progress bar (tqdm; if that is not installed, a line on stderr for every layer);
            default: on a terminal.

    Returns:
        The metrics: a table to print, and :meth:`Sensitivity.amounts`.

    Raises:
        ValueError: sparsities out of range or none; no such pattern or layers; NaN or infinity in a weight.
        TypeError: ``evaluate`` does not return a number, or an argument of another type.
    """
    if not callable(evaluate):
        raise TypeError(f"evaluate must be a function of the model, but is {type(evaluate).__name__}")
    parsed = parse_pattern(pattern)
    if isinstance(sparsities, str) or not isinstance(sparsities, Iterable):
        raise TypeError(f"sparsities must be several numbers, such as (0.5, 0.9), but is {sparsities!r}")
    given = tuple(sparsities)
    wanted = sorted({check_sparsity(s, parse_pattern("unstructured"), "sparsities") for s in given})
    if parsed.sparsity is not None:
        wanted = [parsed.sparsity]
    if not wanted or wanted[0] == 0.0:
        raise ValueError(f"sparsities must be at least one number above 0 and below 1, but are {given}")
    targets = [target for target in find_layers(model, layers) if target.reason is None]
    for target in targets:
        scores_of(target, "magnitude")  # this raises for a weight that is not finite before anything is measured
    bar = _bar([target.name for target in targets], len(wanted), progress)
    try:
        baseline = _measure(model, evaluate, bar)
        metrics = {}
        for target in targets:
            values = []
            for share in wanted:
                mask = choose_masks({"": _scores(target)}, {"": share}, parsed, "layer")[""]
                with _dropped(target, mask):
                    values.append(_measure(model, evaluate, bar))
            metrics[target.name] = tuple(values)
    finally:
        bar.close()
    return Sensitivity(baseline, tuple(wanted), metrics, parsed.name, higher_is_better)


def _scores(target: Target) -> torch.Tensor:
    """Magnitudes of the weights in use: weights that a mask has dropped go first."""
    found = scores_of(target, "magnitude")
    return found if target.mask is None else found * target.mask


@contextmanager
def _dropped(target: Target, mask: torch.Tensor) -> Iterator[None]:
    """Sets some weights of a layer to zero for the time of a ``with`` block."""
    weight = target.parameter
    before = weight.detach().clone()
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _measure(model: torch.nn.Module, evaluate: Callable[[Any], float], bar: _Bar) -> float:
    value: Any = evaluate(model)
    try:
        number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"evaluate must return a number, but returned {value!r:.80}") from None
    bar.update()
    return number


class _Bar(Protocol):
    """The methods of a progress bar that are used."""

    def update(self) -> Any:
        """Counts one measurement."""

    def close(self) -> None:
        """Ends the bar."""


class _Lines:
    """Prints a line for each layer that is done."""

    def __init__(self, layers: Sequence[str], measurements: int, shown: bool) -> None:
        self.layers, self.measurements, self.shown = layers, measurements, shown
        self.done = -1  # the first measurement is of the model as it is

    def update(self) -> None:
        self.done += 1
        number, left = divmod(self.done, self.measurements)
        if self.shown and number and not left:
            name = self.layers[number - 1] or "the model"
            print(f"{_TITLE}: {number} of {len(self.layers)} done ({name})", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


def _bar(layers: Sequence[str], measurements: int, progress: bool | None) -> _Bar:
    """Shows how far a scan is with a number of measurements for each layer."""
    try:
        from tqdm.auto import tqdm  # type: ignore[import-untyped]
    except ModuleNotFoundError:  # a progress bar does not justify a required package
        return _Lines(layers, measurements, sys.stderr.isatty() if progress is None else progress)
    disable = None if progress is None else not progress
    bar: _Bar = tqdm(total=1 + len(layers) * measurements, desc=_TITLE, unit="run", disable=disable)
    return bar
