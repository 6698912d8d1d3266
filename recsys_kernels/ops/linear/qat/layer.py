"""A linear layer that trains the weights that an int8 layer will have."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ....backends import selection
from ..activation import NONE, STATIC, WEIGHT_ONLY, quantize_rows, range_qparams
from ..gradients import before_activation, needs_output
from ..int8.autograd import chain, dequantize
from ..int8.layer import Int8Linear, quantize_weight, runs_packed
from ..int8.spec import Int8Layer
from ..layer import FixedTypes

RANGES = ("running", "learnable")


class _FakeQuantized(torch.autograd.Function):
    """An int8 layer's output, with gradients as if weights and input had not been rounded.

    What was clipped has no gradient. That of the ends of a static range is LSQ's gradient of the scale (Esser et al.,
    "Learned Step Size Quantization", 2020; LSQ+, Bhalgat et al., 2020), by the chain rule: in the range what rounding
    added, in steps; outside of it 1 for the end that was exceeded. It is scaled so that a step of SGD changes the scale
    by the same share of it as with LSQ.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        input_range: torch.Tensor | None,
        q: torch.Tensor,
        scale: torch.Tensor,
        group: int,
        qparams: torch.Tensor | None,
        scheme: int,
        activation: int,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.group, ctx.scheme, ctx.activation, ctx.dtype = group, scheme, activation, input.dtype
        out = _run(input, Int8Layer(q, scale, group, bias, qparams, scheme, activation), dtype)
        ctx.save_for_backward(input, q, scale, bias, qparams, out if needs_output(activation) else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, q, scale, bias, qparams, out = ctx.saved_tensors
        group, scheme, activation = ctx.group, ctx.scheme, ctx.activation

        def again() -> torch.Tensor:
            return _run(input, Int8Layer(q, scale, group, bias, qparams, scheme, NONE), torch.float32)

        grad = before_activation(grad, activation, out, again)
        rows = input.float().reshape(-1, input.shape[-1])
        grad = grad.reshape(-1, grad.shape[-1])
        grad_input = grad_weight = grad_bias = grad_range = None
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[3]:
            grad_rows = grad @ dequantize(q, scale, group)
        if scheme == STATIC:
            rows, inside, grad_ends = _static(rows, qparams)
            if ctx.needs_input_grad[3]:
                grad_range = (grad_rows * grad_ends).sum((1, 2)) * (255.0**1.5 / max(rows.numel(), 1) ** 0.5)
            if ctx.needs_input_grad[0]:
                grad_rows = grad_rows * inside
        elif scheme != WEIGHT_ONLY:
            values, steps, zero_points = quantize_rows(rows, None)
            rows = (values - zero_points) * steps
        if ctx.needs_input_grad[0]:
            grad_input = grad_rows.reshape(input.shape).to(ctx.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = grad.t() @ rows
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, grad_bias, grad_range, None, None, None, None, None, None, None


def _static(rows: torch.Tensor, qparams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as an int8 layer sees them, where they are in its range, and their derivatives by the range's ends."""
    step, zero_point = qparams
    scaled = rows * step.reciprocal()
    below, above = scaled < -zero_point, scaled > 255.0 - zero_point
    inside = ~(below | above)
    rounded = torch.round(torch.minimum(torch.maximum(scaled, -zero_point), 255.0 - zero_point))
    added = (rounded - scaled) / 255.0 * inside
    return rounded * step, inside, torch.stack([below.float() - added, above.float() + added])


def _run(input: torch.Tensor, layer: Int8Layer, dtype: torch.dtype) -> torch.Tensor:
    """The output of the deployed layer, by the way that it takes."""
    weight = layer[0]
    if runs_packed(weight):
        return chain(input, selection.implementation("int8_pack", weight)(*layer), weight.shape[0], dtype)
    return selection.implementation("int8_linear", input)(input, *layer, dtype)


class QATLinear(FixedTypes):
    """A linear layer in training that computes what the :class:`Int8Linear` will compute that it is converted to.

    ``forward`` gives that layer's output bit for bit, in training and in eval mode. The gradients pass the rounding as
    if it were not there (straight-through estimator, Bengio et al., 2013), and reach the float32 weights and bias,
    which any optimizer trains. See :meth:`Int8Linear.qat`, which makes one.

    State (``state_dict``): the parameters ``weight`` and ``bias``, float32; for ``"static"`` ``input_range``,
    float32 [2], (low, high), a parameter if it is learnable and else a buffer; NaN until the first batch.

    Attributes:
        ranges: how the static range is found: ``"running"`` or ``"learnable"``.
        momentum: share of a batch in a running range.
    """

    input_range: torch.Tensor | None

    def __init__(
        self,
        linear: torch.nn.Linear,
        activation: str,
        epilogue: str | None,
        granularity: str | int,
        ranges: str,
        input_range: tuple[float, float] | None,
        momentum: float,
    ) -> None:
        if ranges not in RANGES:
            raise ValueError(f"ranges must be 'running' or 'learnable', but is {ranges!r}")
        if not 0.0 < momentum <= 1.0:
            raise ValueError(f"momentum must be above 0 and at most 1, but is {momentum}")
        # It checks everything else: options, values, types.
        static = activation == "static"
        known = (-1.0, 1.0) if static and input_range is None else input_range
        sample = Int8Linear.from_float(
            linear, activation, epilogue=epilogue, granularity=granularity, input_range=known
        )
        super().__init__(sample.dtype)
        self._numbers = sample.operands()[2], *sample.operands()[5:]
        self.in_features, self.out_features = sample.in_features, sample.out_features
        self.activation, self.epilogue, self.granularity = activation, epilogue, granularity
        self.ranges, self.momentum = ranges, momentum
        self.weight = _parameter(linear.weight)
        self.bias = None if linear.bias is None else _parameter(linear.bias)
        ends = None
        if static:
            ends = torch.tensor(input_range or (float("nan"),) * 2, dtype=torch.float32, device=linear.weight.device)
        if ranges == "learnable" and ends is not None:
            self.input_range = torch.nn.Parameter(ends)
        else:
            self.register_buffer("input_range", ends)
        self.train(linear.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] of float32, float16 or bfloat16 to [..., out_features].

        In training mode a static layer takes note of the input's range: a running one moves towards it, a learnable one
        starts with it.

        Raises:
            RuntimeError: a wrong shape, type or device; a static layer that has seen no input yet, in eval mode.
            ValueError: the weights have become NaN or infinite.
        """
        return self.run(input, self.dtype)

    def run(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """:meth:`forward` with another type of the output."""
        if self.training and self.input_range is not None:
            self._observe(input)
        with torch.no_grad():
            q, scale = quantize_weight(self.weight, self.granularity)
            if self.granularity == "tensor":
                scale = scale.expand(self.out_features, 1)
            qparams = self._qparams()
        group, scheme, epilogue = self._numbers
        return _FakeQuantized.apply(
            input, self.weight, self.bias, self.input_range, q, scale, group, qparams, scheme, epilogue, dtype
        )

    @torch.no_grad()
    def _observe(self, input: torch.Tensor) -> None:
        ends = self.input_range
        assert ends is not None
        fresh = ends.isnan()
        if input.numel() == 0 or (self.ranges == "learnable" and not torch.compiler.is_compiling() and not fresh.any()):
            return
        values = input.detach().float()
        finite = torch.isfinite(values)
        low, high = torch.where(finite, values, torch.inf).amin(), torch.where(finite, values, -torch.inf).amax()
        new = torch.stack([low, high])
        moved = torch.lerp(ends, new, self.momentum) if self.ranges == "running" else ends
        ends.copy_(torch.where(torch.isfinite(new), torch.where(fresh, new, moved), ends))

    def _qparams(self) -> torch.Tensor | None:
        if self.input_range is None:
            return None
        low, high = self.input_range.detach()
        if not torch.compiler.is_compiling() and (low.isnan() or high.isnan()):
            raise RuntimeError(
                "a static layer in quantization-aware training has seen no input: call it in training mode first, "
                "or give input_range"
            )
        return torch.stack(range_qparams(low.clamp(max=0.0), high.clamp(min=0.0)))

    @torch.no_grad()
    def convert(self) -> Int8Linear:
        """The deployed layer, whose output is that of this one in eval mode, bit for bit.

        Raises:
            RuntimeError: a static layer that has seen no input yet.
            ValueError: the weights have become NaN or infinite.
        """
        sizes = (self.in_features, self.out_features, self.bias is not None)
        options = (self.activation, self.epilogue, self.granularity)
        new = Int8Linear(*sizes, *options, dtype=self.dtype, device=self.weight.device)
        new.set_float(self.weight, self.bias)
        new.input_qparams = self._qparams()
        return new.train(self.training)

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"]
        parts.append(f"activation={self.activation!r}")
        if self.epilogue is not None:
            parts.append(f"epilogue={self.epilogue!r}")
        if self.granularity != "channel":
            parts.append(f"granularity={self.granularity!r}")
        if self.activation == "static":
            parts.append(f"ranges={self.ranges!r}")
        return ", ".join(parts)


def _parameter(values: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(values.detach().float().clone(), values.requires_grad)
