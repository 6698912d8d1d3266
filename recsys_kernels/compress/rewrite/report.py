"""The report of ``optimize``: the changes of each layer and of the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from ..converters.converter import LayerDecision
from ..converters.measure import times_text
from ..sizes import dtype_name, stored_bytes
from .plan import RewritePlan


@dataclass(frozen=True)
class LayerReport:
    """One layer that was replaced or kept.

    Attributes:
        names: every place in the model where it is.
        kind: name of its class.
        action: its new form, such as ``"int8"`` or ``"sparse"``; ``"kept"`` if it was left alone.
        reason: why the layer was kept; for a swapped layer notes about it, often none.
        shape: rows and columns.
        dtype: type of its values before.
        bytes_before, bytes_after: bytes of its parameters and buffers, scales, indices and padding between rows
            included.
        max_error: largest absolute error of a value; None if it was kept.
        relative_error: the same, as a share of the largest absolute value.
        sqnr: of a linear layer: power of its output over that of the error that its new form makes, in dB; None if not
            measured.
        float_us, int8_us: time of a call in float and in its new form, microseconds; time of the whole call where
            several layers run in one; None if not measured.
        sparsity, pattern: of a sparse layer: share of its weights that are dropped, and how; else None.
    """

    names: tuple[str, ...]
    kind: str
    action: str
    reason: str
    shape: tuple[int, int]
    dtype: str
    bytes_before: int
    bytes_after: int
    max_error: float | None = None
    relative_error: float | None = None
    sqnr: float | None = None
    float_us: float | None = None
    int8_us: float | None = None
    sparsity: float | None = None
    pattern: str | None = None

    @property
    def name(self) -> str:
        """All names in one string."""
        return ", ".join(name or "(the model)" for name in self.names)


@dataclass(frozen=True)
class CallReport:
    """One call of the model that was compared.

    Attributes:
        name: ``"forward"`` for the call with ``sample_inputs``, or the method or function.
        output_error: largest absolute difference of the outputs.
        float_us, new_us: microseconds of a call before and after, on the very arguments; None if nothing was replaced.
    """

    name: str
    output_error: float
    float_us: float | None = None
    new_us: float | None = None

    def __str__(self) -> str:
        where = "the sample inputs" if self.name == "forward" else f"the call {self.name!r}"
        text = f"outputs on {where}: largest difference {self.output_error:.3g}"
        if self.float_us is None or self.new_us is None:
            return text
        return f"{text}; {times_text(self.float_us, self.new_us)}"


@dataclass(frozen=True)
class OptimizeReport:
    """The changes that ``optimize`` made: print it to read it.

    Attributes:
        layers: one entry a layer of the kinds asked for, in the model's order.
        bytes_before, bytes_after: bytes of all parameters and buffers of the model; shared memory counts once.
        output_error: largest absolute difference of the outputs of all calls; None if the model was not run.
        notes: further differences of the new model.
        calls: one entry a call of the model: with ``sample_inputs``, and of each of ``methods``.
    """

    layers: tuple[LayerReport, ...]
    bytes_before: int
    bytes_after: int
    output_error: float | None = None
    notes: tuple[str, ...] = ()
    calls: tuple[CallReport, ...] = ()

    @property
    def slower(self) -> tuple[str, ...]:
        """Names of replaced layers and of calls that were measured to be slower than before."""
        layers = [layer.name for layer in self.swapped if _is_slower(layer.float_us, layer.int8_us)]
        return (*layers, *(call.name for call in self.calls if _is_slower(call.float_us, call.new_us)))

    @property
    def swapped(self) -> tuple[LayerReport, ...]:
        """The layers that have a new form."""
        return tuple(layer for layer in self.layers if layer.action != "kept")

    @property
    def kept(self) -> tuple[LayerReport, ...]:
        """The layers that were left alone."""
        return tuple(layer for layer in self.layers if layer.action == "kept")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; tuples become lists."""

        def plain(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return [plain(item) for item in value] if isinstance(value, tuple) else value

        return plain(asdict(self))

    def __str__(self) -> str:
        lines = []
        if self.layers:
            rows: list[tuple[str, ...]] = [("layer", "kind", "rows x columns", "type", "now", "bytes", "max error", "")]
            rows += [_cells(layer) for layer in self.layers]
            widths = [max(len(row[column]) for row in rows) for column in range(7)]
            lines += [_line(row, widths) for row in rows]
            lines.insert(1, "  ".join("-" * width for width in widths))
        else:
            lines.append("no layer of the kinds asked for")
        if self.swapped:
            share = self.bytes_before / self.bytes_after
            lines.append(
                f"whole model: {self.bytes_before:,} -> {self.bytes_after:,} bytes ({share:.2f} times smaller); "
                "max error in % of the layer's largest value"
            )
        else:
            lines.append(f"whole model: {self.bytes_before:,} bytes as before")
        lines += map(str, self.calls)
        if slower := [repr(layer.name) for layer in self.swapped if _is_slower(layer.float_us, layer.int8_us)]:
            lines.append(f"slower than in float at this size: {', '.join(slower)}; skip= keeps such layers in float")
        if not self.calls and self.swapped:
            lines.append("outputs were not compared: no sample_inputs given")
        return "\n".join([*lines, *self.notes])


def _cells(layer: LayerReport) -> tuple[str, ...]:
    rows, columns = layer.shape
    size, error = f"{layer.bytes_before:,}", ""
    if layer.max_error is not None and layer.relative_error is not None:
        size += f" -> {layer.bytes_after:,}"
        error = f"{layer.max_error:.2g} ({layer.relative_error:.1%})"
    return layer.name, layer.kind, f"{rows:,} x {columns:,}", layer.dtype, layer.action, size, error, layer.reason


def _is_slower(float_us: float | None, new_us: float | None) -> bool:
    return float_us is not None and new_us is not None and new_us > float_us


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    left = {0, 1, 3, 4}
    cells = [
        cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=False))
    ]
    return "  ".join([*cells, row[7]]).rstrip()


def report_of(
    plan: RewritePlan, model: torch.nn.Module, new: torch.nn.Module, calls: tuple[CallReport, ...]
) -> OptimizeReport:
    """The report of a plan that was carried out."""
    contents = plan.contents
    order = {key: number for number, key in enumerate((*contents.modules, *contents.unregistered))}
    decisions = [plan.decisions[key] for key in sorted(plan.decisions, key=order.__getitem__)]
    return OptimizeReport(
        layers=tuple(_describe(layer, plan.masked) for layer in decisions),
        bytes_before=stored_bytes(model),
        bytes_after=stored_bytes(new),
        output_error=max((call.output_error for call in calls), default=None),
        notes=tuple(dict.fromkeys(plan.notes)),
        calls=calls,
    )


def _describe(layer: LayerDecision, masked: Mapping[int, torch.nn.Module]) -> LayerReport:
    module, given = layer.module, masked.get(id(layer.module), layer.module)
    tensors = [*given.parameters(), *given.buffers()]
    before = sum(tensor.nbytes for tensor in tensors if not is_lazy(tensor))
    new = layer.replacement
    error = relative = None
    if new is not None:
        error = layer.converter.max_error(module, new)
        largest = max(abs(value.item()) for value in module.weight.detach().aminmax())
        relative = error / largest if largest else 0.0
    return LayerReport(
        names=tuple(layer.names),
        kind=type(module).__name__,
        action="kept" if new is None else layer.choice,
        reason=layer.reason_to_keep or "; ".join(layer.notes),
        shape=layer.converter.shape(module),
        dtype=dtype_name(tensors[0]) if tensors else "",
        bytes_before=before,
        bytes_after=before if new is None else stored_bytes(new),
        max_error=error,
        relative_error=relative,
        sqnr=layer.sqnr,
        float_us=layer.float_us,
        int8_us=layer.replacement_us,
        **({} if new is None else layer.converter.report_fields(layer)),
    )
