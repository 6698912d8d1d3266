"""Linear layers with int8 weights: what ``optimize`` swaps them for, and how well and how fast new layers do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ...ops.linear.int8 import Int8Linear
from ...ops.linear.int8.layer import MODULES
from ..rewrite.plan import Layer, Plan
from ..rewrite.sequences import Step, folded, joined
from .tables import stored_bytes

Range = tuple[float, float]

MIN_SQNR = 20.0  # dB: the noise is a tenth of the signal

# Values of the option, and what ``activation`` of an Int8Linear they are.
SCHEMES = {"int8": "dynamic", "int8-static": "static", "int8-weight-only": "weight_only"}

_CONTAINERS = (torch.nn.Module, torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)
# A measurement ends after this many rounds or seconds, whichever comes first, but not before 5 rounds.
_ROUNDS, _SECONDS = 50, 0.1


class LinearConverter:
    """``torch.nn.Linear`` as :class:`~recsys_kernels.Int8Linear`.

    Args:
        ranges: id of a layer -> the range of its input, for ``"int8-static"``.
    """

    option = "linear"
    choices: tuple[str, ...] = tuple(SCHEMES)
    swaps: tuple[type[torch.nn.Module], ...] = (torch.nn.Linear,)
    handles: tuple[type[torch.nn.Module], ...] = (torch.nn.Linear, Int8Linear)
    parameters = frozenset({"weight", "bias"})

    def __init__(self, ranges: Mapping[int, Range] | None = None) -> None:
        self._ranges = ranges

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def reason_to_keep(self, module: Any, choice: str, parents: Sequence[torch.nn.Module]) -> str | None:
        if reason := self.reason_by_kind(module, parents):
            return reason
        try:
            sized = self._empty(module, choice, "meta")
        except ValueError as refusal:
            return str(refusal)
        before = stored_bytes(module)
        if (nbytes := stored_bytes(sized)) >= before:
            return f"too small: {choice} would take {nbytes:,} bytes, scales included"
        return self.reason_by_range(module)

    def reason_by_kind(self, module: Any, parents: Sequence[torch.nn.Module]) -> str | None:
        """Why a layer cannot be swapped whatever the new form is."""
        for parent in parents:
            if reader := _torch_class(parent):
                return f"inside a {reader}, which reads its weight"
        weight = module.weight
        if tuple(weight.shape) != self.shape(module):
            return f"its weight is {tuple(weight.shape)}, not out_features x in_features"
        return "its weight is float64, which int8 layers do not give" if weight.dtype == torch.float64 else None

    def reason_by_range(self, module: Any) -> str | None:
        """Why a static layer cannot be made."""
        missing = self._ranges is not None and id(module) not in self._ranges
        return "no range of its input in ranges" if missing else None

    def range_of(self, module: Any) -> Range | None:
        """The range of a layer's input, of a static one."""
        return None if self._ranges is None else self._ranges[id(module)]

    def least_sqnr(self, new: Any) -> float:
        """The signal-to-quantization-noise ratio in dB under which a layer is kept unless the user says another."""
        return MIN_SQNR

    def _empty(self, module: Any, choice: str, device: str) -> Int8Linear:
        bias, scheme = module.bias is not None, SCHEMES[choice]
        return Int8Linear(
            module.in_features, module.out_features, bias, scheme, dtype=module.weight.dtype, device=device
        )

    def convert(self, modules: Sequence[Any], choice: str) -> list[Any]:
        scheme = SCHEMES[choice]
        new: list[Any] = []
        for module in modules:
            layer = Int8Linear.from_float(module, scheme, input_range=self.range_of(module))
            if new:
                layer.weight, layer.weight_scale = new[0].weight, new[0].weight_scale
            new.append(layer)
        return new

    def max_error(self, module: Any, new: Any) -> float:
        weight = module.weight.detach().float()
        return (new.dequantize().float() - weight).abs().max().item()


def _torch_class(module: torch.nn.Module) -> str | None:
    """The class of torch.nn that a module is one of, if not of a container: attention, for one, reads weights."""
    classes = [c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.") and c not in _CONTAINERS]
    return classes[0].__name__ if classes else None


# ---- noise ---------------------------------------------------------------------------------------------------------


def leave_noisy(plan: Plan, min_sqnr: float | None) -> None:
    """Notes the signal-to-quantization-noise ratio of each linear layer, and keeps those where it is too low.

    Each layer is measured on its own input in the float model. To be called after :meth:`Plan.convert`. Without a
    ``min_sqnr``, :meth:`LinearConverter.least_sqnr` says what is too low.
    """
    epilogues = {id(layer): epilogue for run in plan.runs() for layer, epilogue in run.steps}
    for layer in plan.swapped:
        if not isinstance(layer.converter, LinearConverter):
            continue
        rows = None if plan.trial is None else plan.trial.inputs.get(id(layer.module))
        rows = None if rows is None else rows[torch.isfinite(rows).all(1)]
        if rows is None or not rows.numel():
            layer.notes.append("not called on the sample inputs: nothing measured")
            continue
        epilogue = epilogues.get(id(layer))
        layer.sqnr = sqnr(layer.module, folded(layer.new, epilogue), epilogue, rows)
        layer.notes.append(f"SQNR {layer.sqnr:.1f} dB")
        least = layer.converter.least_sqnr(layer.new) if min_sqnr is None else min_sqnr
        if layer.sqnr < least:
            layer.leave(f"SQNR {layer.sqnr:.1f} dB, less than min_sqnr={least:g}")


@torch.no_grad()
def sqnr(linear: torch.nn.Linear, new: torch.nn.Module, epilogue: str | None, rows: torch.Tensor) -> float:
    """The power of a float layer's output over that of the error of a new one, in dB; infinite without an error."""
    bias = None if linear.bias is None else linear.bias.float()
    wanted = F.linear(rows.float(), linear.weight.float(), bias)
    if epilogue is not None:
        wanted = MODULES[epilogue]()(wanted)
    out = new.forward(rows)
    signal, noise = wanted.double().square().sum(), (out.double() - wanted.double()).square().sum()
    return 10 * torch.log10(signal / noise).item() if noise else float("inf")


# ---- speed ---------------------------------------------------------------------------------------------------------


def leave_slow(plan: Plan, batch_size: int | None) -> None:
    """Measures each call that is to take the place of float layers, and keeps those where float is faster.

    To be called after :meth:`Plan.convert`.

    Args:
        plan: the plan; its trial has the inputs, which are random numbers without a trial.
        batch_size: for how many examples; that of the sample inputs if None.
    """
    runs = plan.runs()
    inside = {id(layer) for run in runs for layer, _ in run.steps}
    calls: list[list[Step]] = [call for run in runs for call in run.calls()]
    calls += [[(layer, None)] for layer in plan.swapped if id(layer) not in inside]
    for call in calls:
        layers = [layer for layer, _ in call]
        if (
            isinstance(layers[0].converter, LinearConverter)
            and (rows := _rows(plan, layers[0], batch_size)) is not None
        ):
            _judge(layers, rows, *_time(call, rows))


def row_count(plan: Plan, layer: Layer, batch_size: int | None) -> int | None:
    """Rows of a layer's input for a number of examples; None if it was not called."""
    if plan.trial is None:
        return batch_size or 1
    count = plan.trial.rows.get(id(layer.module))
    if count is None or batch_size is None:
        return count
    return max(1, round(count * batch_size / plan.trial.batch_size)) if plan.trial.batch_size else batch_size


def _rows(plan: Plan, layer: Layer, batch_size: int | None) -> torch.Tensor | None:
    """A layer's input for a number of examples; None if it was not called."""
    weight, count = layer.module.weight, row_count(plan, layer, batch_size)
    if count is None:
        return None
    if plan.trial is None:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(count, layer.module.in_features, generator=generator).to(weight.device, weight.dtype)
    known = plan.trial.inputs[id(layer.module)]
    return known[torch.arange(count, device=known.device) % len(known)]


def _time(call: Sequence[Step], rows: torch.Tensor) -> tuple[float, float]:
    """Microseconds of the float layers and of the new ones."""
    floats = torch.nn.Sequential()
    for layer, epilogue in call:
        twin = torch.nn.Linear(1, 1, device="meta")
        twin.weight, twin.bias = layer.module.weight, layer.module.bias
        floats.append(twin)
        if epilogue is not None:
            floats.append(MODULES[epilogue]())
    new = joined([folded(layer.new, epilogue) for layer, epilogue in call])
    return _microseconds(floats if len(floats) > 1 else floats[0], new, rows)


def _judge(layers: Sequence[Layer], rows: torch.Tensor, float_us: float, new_us: float) -> None:
    count = f"{len(rows):,} row{'s' if len(rows) > 1 else ''}"
    names = [layer.names[0] or "(the model)" for layer in layers]
    together = f" (one call of {names[0]!r} to {names[-1]!r})" if len(layers) > 1 else ""
    sparse = not isinstance(layers[0].new, Int8Linear)
    old, new = ("dense", layers[0].choice) if sparse else ("float", "int8")
    for number, layer in enumerate(layers):
        layer.float_us, layer.new_us = float_us, new_us
        if float_us < new_us:
            reason = f"{old} is faster for {count}: {_us(float_us)} us, {new} {_us(new_us)} us{together}"
            layer.leave(reason, unmasks=True)
        elif number == 0:
            layer.notes.append(f"{_us(new_us)} us instead of {_us(float_us)} for {count}{together}")
        else:
            layer.notes.append(f"in the call of {names[0]!r}")


def _us(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"


@torch.inference_mode()
def _microseconds(first: Callable[..., Any], second: Callable[..., Any], rows: torch.Tensor) -> tuple[float, float]:
    """Median time of a call of each, in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    wait = torch.cuda.synchronize if rows.is_cuda else lambda: None
    end = time.perf_counter() + _SECONDS
    for number in range(-2, _ROUNDS):
        for model, seconds in zip((first, second), times, strict=True):
            wait()
            start = time.perf_counter()
            model(rows)
            wait()
            if number >= 0:
                seconds.append(time.perf_counter() - start)
        if number >= 5 and time.perf_counter() > end:
            break
    one, other = (1e6 * sorted(seconds)[len(seconds) // 2] for seconds in times)
    return one, other
