"""The common part of the converters of linear layers: layers that are left alone, fusion, noise and speed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from ...ops.linear.int8 import Int8Linear, Int8MLP
from ...ops.linear.int8.layer import MODULES
from ...ops.linear.int8.mlp import EPILOGUES
from ...ops.linear.sparse import SparseLinear, SparseMLP
from .converter import (
    Check,
    Converter,
    FusedStep,
    InputRange,
    LayerDecision,
    ObservedCall,
    Options,
    RewriteState,
)
from .measure import median_microseconds, microseconds_text

# The power of the noise is a hundredth of the signal's.
MIN_SQNR = 20.0
# Values of the option for which input ranges are needed.
STATIC_CHOICES = ("int8-static", "int8-static+sparse")

# Enough rows for a ratio of two sums of squares.
_OBSERVED_ROWS = 512

_CONTAINERS = (torch.nn.Module, torch.nn.Sequential, torch.nn.ModuleList, torch.nn.ModuleDict)


class LinearConverter(Converter):
    """The converter of ``torch.nn.Linear``, whatever the new form is.

    Args:
        ranges: the range of the input of each layer by id of the layer, for static layers.
        min_sqnr: the signal-to-quantization-noise ratio in dB under which a layer is kept; None: the default.
        batch_size: the number of examples for which layers are timed; None: as many as the sample inputs have.
        timed: whether layers are timed.
    """

    option: ClassVar[str] = "linear"
    replaceable: ClassVar[tuple[type[torch.nn.Module], ...]] = (torch.nn.Linear,)
    covered: ClassVar[tuple[type[torch.nn.Module], ...]] = (torch.nn.Linear, Int8Linear)
    parameters: ClassVar[frozenset[str]] = frozenset({"weight", "bias"})

    def __init__(
        self,
        ranges: Mapping[int, InputRange] | None = None,
        min_sqnr: float | None = None,
        batch_size: int | None = None,
        timed: bool = False,
    ) -> None:
        self._ranges, self._min_sqnr = ranges, min_sqnr
        self.batch_size, self.timed = batch_size, timed

    @classmethod
    def check_options(cls, options: Options) -> None:
        linear = options.choices.get("linear")
        static = linear in STATIC_CHOICES
        if static and options.ranges is None:
            raise ValueError(f"linear={linear!r} needs ranges=rk.calibrate(model, batches)")
        if options.ranges is not None and not static:
            raise ValueError(f"ranges is for linear='int8-static', but linear is {linear!r}")
        if options.min_sqnr is not None and (linear is None or not options.sampled):
            raise ValueError("min_sqnr needs linear and sample_inputs, on which the noise is measured")

    @staticmethod
    def common_arguments(options: Options) -> dict[str, Any]:
        """The arguments of the constructor."""
        return {
            "ranges": ranges_by_id(options.model, options.ranges),
            "min_sqnr": options.min_sqnr,
            "batch_size": options.batch_size,
            "timed": options.sampled or options.batch_size is not None,
        }

    def shape(self, module: Any) -> tuple[int, int]:
        return module.out_features, module.in_features

    def reason_by_kind(self, module: Any, parents: Sequence[torch.nn.Module]) -> str | None:
        """Why a layer cannot be replaced, whatever the new form is."""
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

    def range_of(self, module: Any) -> InputRange | None:
        """The range of a static layer's input."""
        return None if self._ranges is None else self._ranges[id(module)]

    def max_error(self, module: Any, replacement: Any) -> float:
        weight = module.weight.detach().float()
        return (replacement.dequantize().float() - weight).abs().max().item()

    def observe(self, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> ObservedCall | None:
        """Up to 512 rows of the input, [rows, in_features]."""
        given = arguments[0] if arguments else keywords.get("input")
        if not isinstance(given, torch.Tensor) or not given.dim() or not given.numel():
            return None
        rows = given.detach().reshape(-1, given.shape[-1])
        return ObservedCall(rows[:_OBSERVED_ROWS].clone(), len(rows))

    def checks(self) -> Sequence[Check]:
        return self._keep_noisy, self._keep_slow

    # ---- fusion ----

    def fuses(self, module: torch.nn.Module) -> bool:
        return isinstance(module, torch.nn.Linear)

    def epilogue(self, module: torch.nn.Module) -> str | None:
        if isinstance(module, torch.nn.GELU) and module.approximate != "none":
            return None
        return EPILOGUES.get(type(module))

    def with_epilogue(self, replacement: Any, epilogue: str | None) -> Any:
        if isinstance(replacement, Int8Linear):
            return replacement.with_epilogue(epilogue)
        assert isinstance(replacement, SparseLinear)
        options = {"pattern": replacement.pattern, "epilogue": epilogue, "activation": replacement.activation}
        other = SparseLinear(
            replacement.in_features,
            replacement.out_features,
            replacement.bias is not None,
            **options,  # type: ignore[arg-type]
            dtype=replacement.dtype,
            device="meta",
        )
        for name in (*replacement._parameters, *replacement._buffers):
            setattr(other, name, getattr(replacement, name))
        return other.train(replacement.training)

    def group_calls(self, steps: Sequence[FusedStep]) -> list[list[FusedStep]]:
        calls: list[list[FusedStep]] = []
        for is_int8, group in groupby(steps, lambda step: isinstance(step.layer.replacement, Int8Linear)):
            together = list(group)
            calls += [together] if is_int8 else [[step] for step in together]
        return calls

    def joined(self, replacements: Sequence[Any]) -> torch.nn.Module:
        return Int8MLP(*replacements) if len(replacements) > 1 else replacements[0]

    def whole(self, calls: Sequence[Sequence[Any]]) -> torch.nn.Module:
        if len(calls) == 1 and isinstance(calls[0][0], Int8Linear):
            return Int8MLP(*calls[0])
        return SparseMLP(*map(self.joined, calls))

    # ---- noise ----

    def default_min_sqnr(self, replacement: Any) -> float:
        """The ratio in dB under which a layer is kept unless the user names another."""
        return MIN_SQNR

    def _keep_noisy(self, state: RewriteState) -> None:
        """Measures the noise of each new layer on the layer's own input, and keeps layers that get too noisy."""
        if state.observed_calls is None:
            return
        epilogues = {id(step.layer): step.epilogue for sequence in state.fused_sequences() for step in sequence.steps}
        for layer in state.replaced_by(self):
            rows = _input_rows(state, layer)
            rows = None if rows is None else rows[torch.isfinite(rows).all(1)]
            if rows is None or not rows.numel():
                layer.notes.append("not called on the sample inputs: nothing measured")
                continue
            epilogue = epilogues.get(id(layer))
            layer.sqnr = sqnr(layer.module, self.with_epilogue(layer.replacement, epilogue), epilogue, rows)
            layer.notes.append(f"SQNR {layer.sqnr:.1f} dB")
            least = self.default_min_sqnr(layer.replacement) if self._min_sqnr is None else self._min_sqnr
            if layer.sqnr < least:
                layer.keep(f"SQNR {layer.sqnr:.1f} dB, less than min_sqnr={least:g}")

    # ---- speed ----

    def _keep_slow(self, state: RewriteState) -> None:
        """Times each call that is to take the place of float layers, and keeps the layers where float is faster."""
        if not self.timed:
            return
        sequences = [sequence for sequence in state.fused_sequences() if sequence.converter is self]
        calls = [call for sequence in sequences for call in sequence.calls()]
        fused = {id(step.layer) for sequence in sequences for step in sequence.steps}
        calls += [[FusedStep(layer, None)] for layer in state.replaced_by(self) if id(layer) not in fused]
        for call in calls:
            rows = self._timed_rows(state, call[0].layer)
            if rows is not None:
                _judge(call, rows, *self._time(call, rows))

    def row_count(self, state: RewriteState, layer: LayerDecision) -> int | None:
        """The rows of a layer's input for the number of examples; None if the layer was not called."""
        if state.observed_calls is None:
            return self.batch_size or 1
        call = state.observed_calls.get(id(layer.module))
        if call is None or self.batch_size is None:
            return None if call is None else call.rows
        examples = state.sample_batch_size
        return max(1, round(call.rows * self.batch_size / examples)) if examples else self.batch_size

    def _timed_rows(self, state: RewriteState, layer: LayerDecision) -> torch.Tensor | None:
        """A layer's input for the number of examples; None if the layer was not called."""
        weight, count = layer.module.weight, self.row_count(state, layer)
        if count is None:
            return None
        known = _input_rows(state, layer)
        if known is None:
            generator = torch.Generator().manual_seed(0)
            return torch.randn(count, layer.module.in_features, generator=generator).to(weight.device, weight.dtype)
        return known[torch.arange(count, device=known.device) % len(known)]

    def _time(self, call: Sequence[FusedStep], rows: torch.Tensor) -> tuple[float, float]:
        """Microseconds of the float layers and of the new ones."""
        floats = torch.nn.Sequential()
        for layer, epilogue in call:
            twin = torch.nn.Linear(1, 1, device="meta")
            twin.weight, twin.bias = layer.module.weight, layer.module.bias
            floats.append(twin)
            if epilogue is not None:
                floats.append(MODULES[epilogue]())
        new = self.joined([self.with_epilogue(layer.replacement, epilogue) for layer, epilogue in call])
        return _microseconds(floats if len(floats) > 1 else floats[0], new, rows)


def ranges_by_id(model: torch.nn.Module, ranges: Mapping[str, InputRange] | None) -> dict[int, InputRange] | None:
    """The ranges by id of the layer instead of by name.

    Raises:
        ValueError: a name that no module has.
    """
    if ranges is None:
        return None
    modules = dict(model.named_modules(remove_duplicate=False))
    unknown = sorted(name for name in ranges if name not in modules)
    if unknown:
        raise ValueError(f"ranges: {unknown[0]!r} names no module of the model")
    return {id(modules[name]): given for name, given in ranges.items()}


def _torch_class(module: torch.nn.Module) -> str | None:
    """The class of torch.nn that a module is one of, containers aside: attention, for one, reads weights."""
    classes = [c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.") and c not in _CONTAINERS]
    return classes[0].__name__ if classes else None


def _input_rows(state: RewriteState, layer: LayerDecision) -> torch.Tensor | None:
    """The rows that a layer got in the run on sample inputs, [rows, in_features]; None if it got none."""
    call = (state.observed_calls or {}).get(id(layer.module))
    return None if call is None else call.input


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


def _microseconds(first: Callable[..., Any], second: Callable[..., Any], rows: torch.Tensor) -> tuple[float, float]:
    with torch.inference_mode():
        return median_microseconds(partial(first, rows), partial(second, rows), on_gpu=rows.is_cuda)


def _judge(call: Sequence[FusedStep], rows: torch.Tensor, float_us: float, new_us: float) -> None:
    """Keeps the layers of a call where float is faster, and notes both times."""
    layers = [step.layer for step in call]
    count = f"{len(rows):,} row{'s' if len(rows) > 1 else ''}"
    names = [layer.names[0] or "(the model)" for layer in layers]
    together = f" (one call of {names[0]!r} to {names[-1]!r})" if len(layers) > 1 else ""
    sparse = not isinstance(layers[0].replacement, Int8Linear)
    old, new = ("dense", layers[0].choice) if sparse else ("float", "int8")
    old_text, new_text = microseconds_text(float_us), microseconds_text(new_us)
    for number, layer in enumerate(layers):
        layer.float_us, layer.replacement_us = float_us, new_us
        if float_us < new_us:
            layer.keep(f"{old} is faster for {count}: {old_text} us, {new} {new_text} us{together}", drops_mask=True)
        elif number == 0:
            layer.notes.append(f"{new_text} us instead of {old_text} for {count}{together}")
        else:
            layer.notes.append(f"in the call of {names[0]!r}")
