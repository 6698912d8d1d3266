"""A linear layer with int8 weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.autograd import forward_ad

from ....backends import selection
from ..activation import (
    MIN_SCALE,
    STATIC,
    WEIGHT_ONLY,
    epilogue_number,
    input_qparams,
    scheme_number,
)
from ..gradients import autocast_type, check_tensor, is_traced, is_transformed
from ..layer import (
    MODULES,
    FixedTypes,
)
from ..operands import (
    FLOATS,
    GROUPS,
    MAX_IN_FEATURES,
    num_groups,
)
from ..prepared import Prepared, count_writes, trained
from . import autograd as op
from .spec import Int8Layer

if TYPE_CHECKING:
    from ..qat import QATLinear

T = TypeVar("T")
# What ``selection.implementation`` gives unless another backend was asked for.
CHAIN = torch.ops.recsys_kernels.int8_chain.default
RUN_CHAIN = selection.without_wrapper(CHAIN)
# What it takes for a type: looked up, for it is half a percent of a request's time.
NUMBERS: dict[torch.dtype, Any] = {dtype: selection.dtype_argument(dtype) for dtype in FLOATS}


def quantize_weight(weight: torch.Tensor, granularity: str | int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 weights in [-127, 127] and their float32 scales: max|w| / 127.

    Returns:
        int8 [N, K], and [N, 1] ("channel"), [1, 1] ("tensor") or [N, ceil(K / granularity)].

    Raises:
        ValueError: a row holds NaN or infinity (named; compiled code does not look).
    """
    weight = weight.detach().float()
    if not weight.is_meta and not torch.compiler.is_compiling():
        bad = ~torch.isfinite(weight).all(1)
        if bad.any():
            raise ValueError(f"row {int(bad.nonzero()[0])} of weight holds NaN or infinity and can't be quantized")
    if granularity == "tensor":
        largest = weight.abs().amax().reshape(1, 1)
    elif granularity == "channel":
        largest = weight.abs().amax(1, keepdim=True)
    else:
        group = int(granularity)
        parts = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group)).unflatten(1, (-1, group))
        largest = parts.abs().amax(2)
    scale = (largest / 127.0).clamp(min=MIN_SCALE)
    spread = scale if scale.shape[1] == 1 else scale.repeat_interleave(int(granularity), 1)[:, : weight.shape[1]]
    return torch.round(weight / spread).clamp(-127.0, 127.0).to(torch.int8), scale


class Int8Linear(FixedTypes):
    """``torch.nn.Linear`` with int8 weights, an int8 product and a fused activation function.

    Weights are quantized symmetrically, ``weight = q * weight_scale``; activations to 8 bits with a scale and a zero
    point (Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2018). Products are summed exactly in int32. A row of the input with NaN or infinity gives a row of
    NaN and touches no other.

    State (``state_dict``): ``weight`` int8 [out_features, in_features]; ``weight_scale`` float32 [out_features, 1]
    (per channel), [1, 1] (per tensor) or [out_features, groups], a parameter of ``"weight_only"`` layers and else a
    buffer; the parameter ``bias`` float32 [out_features]; ``input_qparams`` float32 [2], scale and zero point of the
    activations (``"static"`` only). On the CPU the kernels read a packed copy, which is made at the first call and
    again when one of these was replaced or written to (but see :meth:`refresh`).

    ``torch.jit.trace`` of a layer in training mode gives a graph with gradients, in torch's own operators; of a layer
    in evaluation mode a graph that calls one operator and has none.

    The gradients of input and bias go through the dequantized weights; ``"weight_only"`` layers also have the gradient
    of ``weight_scale``. :meth:`qat` trains the weights themselves. ``.half()``, ``.bfloat16()`` and ``.to(dtype)``
    choose the type of the output; the state keeps its types.

    A new layer has zero weights, to load a state into; :meth:`from_float` quantizes one.

    Args:
        in_features: from 1 to 65536 (beyond, sums would overflow int32).
        out_features: from 1.
        bias: whether there is one.
        activation: how the input is taken. ``"dynamic"``: quantized by the range of each row. ``"static"``: by
            ``input_range``, values outside of it are clipped. ``"weight_only"``: in float.
        epilogue: a function that is applied to the result: None, ``"relu"``, ``"gelu"`` (erf), ``"sigmoid"`` or
            ``"silu"``.
        granularity: what shares a scale: ``"channel"`` (an output channel), ``"tensor"``, or 32, 64 or 128 columns of
            a channel.
        input_range: (low, high) of the input, for ``"static"``. A layer to load a state into can do without.
        dtype: type of the output: float32, float16 or bfloat16. The input may have any of them.
        device: where the layer lives.

    Raises:
        ValueError: an argument that is none of these.
    """

    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.nn.Parameter | None
    input_qparams: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        activation: str = "dynamic",
        epilogue: str | None = None,
        granularity: str | int = "channel",
        input_range: tuple[float, float] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(dtype or torch.get_default_dtype())
        if not 1 <= in_features <= MAX_IN_FEATURES or out_features < 1:
            raise ValueError(
                f"in_features must be from 1 to {MAX_IN_FEATURES} and out_features at least 1, "
                f"but are {in_features} and {out_features}"
            )
        self._scheme, self._epilogue = scheme_number(activation), epilogue_number(epilogue)
        if granularity not in ("channel", "tensor", *GROUPS):
            raise ValueError(f"granularity must be 'channel', 'tensor', 32, 64 or 128, but is {granularity!r}")
        if input_range is not None and activation != "static":
            raise ValueError(f"input_range is for activation='static', but activation is {activation!r}")
        self.in_features, self.out_features = in_features, out_features
        self.activation, self.epilogue, self.granularity = activation, epilogue, granularity
        grouped = isinstance(granularity, int)
        groups = num_groups(in_features, int(granularity)) if grouped else 1
        # One group is one scale a channel.
        self._group = int(granularity) if groups > 1 else 0
        scales = (1 if granularity == "tensor" else out_features, groups)
        with torch.inference_mode(False):  # inference tensors would not say when they are written to
            self.register_buffer("weight", torch.zeros(out_features, in_features, dtype=torch.int8, device=device))
            scale = torch.full(scales, MIN_SCALE, dtype=torch.float32, device=device)
            if self._scheme == WEIGHT_ONLY:
                self.register_parameter("weight_scale", torch.nn.Parameter(scale))
            else:
                self.register_buffer("weight_scale", scale)
            zeros = torch.zeros(out_features, dtype=torch.float32, device=device)
            self.register_parameter("bias", torch.nn.Parameter(zeros) if bias else None)
            qparams = None
            if self._scheme == STATIC:
                # Without a range the scale is 0, which forward() refuses.
                qparams = torch.zeros(2) if input_range is None else input_qparams(*input_range)
            self.register_buffer("input_qparams", None if qparams is None else qparams.to(device))
        # Fused optimizers write to parameters without counting them as written to. So once a call was recorded for
        # their gradient their values are compared, which takes 1 us for each.
        self._trains = False
        self._prepared: Prepared[torch.Tensor] | None = None

    @classmethod
    def from_float(
        cls,
        linear: torch.nn.Linear,
        activation: str = "dynamic",
        *,
        epilogue: str | None = None,
        granularity: str | int = "channel",
        input_range: tuple[float, float] | None = None,
    ) -> Int8Linear:
        """Quantizes a float layer. The layer itself is not changed.

        Args:
            linear: the layer.
            activation, epilogue, granularity, input_range: see the class.

        Raises:
            TypeError: not such a module.
            ValueError: an unknown option; ``"static"`` without a range; weights in float64; a row of weights or a bias
                with NaN or infinity (named).
        """
        if not isinstance(linear, torch.nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, but is a {type(linear).__name__}")
        if activation == "static" and input_range is None:
            raise ValueError("activation='static' needs input_range=(low, high), the range of the layer's input")
        weight, bias = linear.weight, linear.bias
        new = cls(
            weight.shape[1],
            weight.shape[0],
            bias is not None,
            activation,
            epilogue,
            granularity,
            input_range,
            weight.dtype,
            weight.device,
        )
        new.set_float(weight, bias)
        return new.train(linear.training)

    @classmethod
    def qat(
        cls,
        linear: torch.nn.Linear,
        activation: str = "dynamic",
        *,
        epilogue: str | None = None,
        granularity: str | int = "channel",
        ranges: str = "running",
        input_range: tuple[float, float] | None = None,
        momentum: float = 0.1,
    ) -> QATLinear:
        """A trainable layer for quantization-aware training; its ``convert()`` gives the deployed one, bit for bit.

        (Jacob et al., 2018, see the class. The gradients: see :class:`~recsys_kernels.ops.linear.qat.QATLinear`.)

        Args:
            linear: the float layer to start from, which is not changed.
            activation, epilogue, granularity: see the class.
            ranges: how a ``"static"`` range is found. ``"running"``: a moving average of the minimum and maximum of the
                batches. ``"learnable"``: by gradient, from the range of the first batch on.
            input_range: (low, high) to start from, for ``"static"``; else that of the first batch.
            momentum: share of a new batch in a running range.

        Raises:
            TypeError: not a ``torch.nn.Linear``.
            ValueError: an unknown option, or what :meth:`from_float` refuses.
        """
        from ..qat import QATLinear

        return QATLinear(linear, activation, epilogue, granularity, ranges, input_range, momentum)

    @torch.no_grad()
    def set_float(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Quantizes float weights into the layer.

        Raises:
            ValueError: a row of the weights or an element of the bias is NaN or infinite (named).
        """
        q, scale = quantize_weight(weight, self.granularity)
        self.weight.copy_(q)
        self.weight_scale.copy_(scale)
        if self._scheme == WEIGHT_ONLY:
            self.weight_scale.requires_grad_(weight.requires_grad)
        if self.bias is not None and bias is not None:
            if not bias.is_meta and not torch.isfinite(bias).all():
                at = int((~torch.isfinite(bias)).nonzero()[0])
                raise ValueError(f"element {at} of bias is NaN or infinity")
            self.bias.copy_(bias)
            self.bias.requires_grad_(bias.requires_grad)

    def with_epilogue(self, epilogue: str | None) -> Int8Linear:
        """A layer with the same tensors (no copies) that applies another function to its result."""
        sizes = (self.in_features, self.out_features, self.bias is not None, self.activation, epilogue)
        new = Int8Linear(*sizes, self.granularity, dtype=self.dtype, device="meta")
        new.weight, new.weight_scale, new.bias = self.weight, self.weight_scale, self.bias
        new.input_qparams = self.input_qparams
        return new.train(self.training)

    def dequantize(self) -> torch.Tensor:
        """The weights as floats, [out_features, in_features] of type ``self.dtype``."""
        return op.dequantize(self.weight, self.weight_scale, self._group).to(self.dtype)

    @torch.no_grad()
    def to_float(self) -> torch.nn.Module:
        """A ``torch.nn.Linear`` with the dequantized weights; with an epilogue, that and its module in a Sequential."""
        linear = torch.nn.Linear(
            self.in_features, self.out_features, self.bias is not None, self.weight.device, self.dtype
        )
        linear.weight.copy_(self.dequantize())
        if self.bias is not None:
            linear.bias.copy_(self.bias)
            linear.bias.requires_grad_(self.bias.requires_grad)
        if self.epilogue is None:
            return linear.train(self.training)
        return torch.nn.Sequential(linear, MODULES[self.epilogue]()).train(self.training)

    # ---- the packed copy --------------------------------------------------------------------------------------------

    def is_fresh(self, prepared: Prepared[Any]) -> bool:
        """Whether something was made of the layer's tensors as they are now."""
        # Straight from the dicts: a request of one row takes 3 us.
        buffers, parameters = self._buffers, self._parameters
        return prepared.is_fresh(
            buffers["weight"],  # type: ignore[arg-type]
            parameters["bias"],
            (parameters if self._scheme == WEIGHT_ONLY else buffers)["weight_scale"],
            buffers["input_qparams"],
        ) and (not self._trains or prepared.has_values(trained(self)))

    def prepare(self, value: T) -> Prepared[T]:
        """What was made of the layer, with what tells whether the layer has changed since."""
        tensors = self.weight, self.bias, self.weight_scale, self.input_qparams
        return Prepared(value, tensors, trained(self) if self._trains else None)

    def operands(self) -> Int8Layer:
        """The layer as the operators take it: from ``weight`` to ``activation``."""
        buffers, parameters = self._buffers, self._parameters
        weight, scale = buffers["weight"], (parameters if self._scheme == WEIGHT_ONLY else buffers)["weight_scale"]
        assert weight is not None
        assert scale is not None
        if self.granularity == "tensor":
            scale = scale.expand(self.out_features, 1)
        bias, qparams = parameters["bias"], buffers["input_qparams"]
        return Int8Layer(weight, scale, self._group, bias, qparams, self._scheme, self._epilogue)

    def pack(self) -> torch.Tensor:
        """The layer as the CPU kernels read it, made anew."""
        qparams = self.input_qparams
        if qparams is not None and not qparams[0] > 0:
            raise RuntimeError(
                "a static layer needs the range of its input: give Int8Linear input_range=(low, high), "
                "or load a state_dict with input_qparams"
            )
        with torch.inference_mode(False), torch.no_grad():
            return selection.implementation("int8_pack", self.weight)(*self.operands())

    def _current_pack(self) -> torch.Tensor | None:
        """The packed copy, as fresh as the state; None where the canonical operands are used."""
        weight = self._buffers["weight"]
        assert weight is not None
        if not runs_packed(weight):
            return None
        prepared = self._prepared
        if prepared is not None and self.is_fresh(prepared):
            return prepared.value
        self._prepared = None
        count_writes(self)
        packed = self.pack()
        if type(packed) is torch.Tensor:  # not a fake one
            self._prepared = self.prepare(packed)
        return packed

    def refresh(self) -> None:
        """Forgets the packed copy, so that the next call makes a new one.

        Needed after writes to single weights through a tensor's ``data`` or through numpy, which leave no trace: a call
        compares the first KiB of weights, bias, scales and range only.
        """
        self._prepared = None

    def needs_grad(self, input: torch.Tensor) -> bool:
        """Whether a call with this input is recorded for a gradient."""
        return torch.is_grad_enabled() and (input.requires_grad or self.is_trained())

    def is_trained(self) -> bool:
        """Whether a parameter has a gradient."""
        bias, scale = self._parameters["bias"], self._parameters.get("weight_scale")
        return (bias is not None and bias.requires_grad) or (scale is not None and scale.requires_grad)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] of float32, float16 or bfloat16 to [..., out_features].

        Raises:
            TypeError: no tensor.
            RuntimeError: a wrong shape, type or device; a static layer that has no range yet.
        """
        try:
            if not torch.compiler.is_compiling():
                # The same as below without what cannot apply: a request of one row takes 3 us.
                prepared, dtype = self._prepared, self.dtype
                if (
                    prepared is not None
                    and self.is_fresh(prepared)
                    and input.dim() == 2
                    and forward_ad._current_level < 0
                ):
                    needs_grad = torch.is_grad_enabled() and (input.requires_grad or self.is_trained())
                    if not needs_grad and selection.implementation("int8_chain", input) is CHAIN:
                        return RUN_CHAIN(input, prepared.value, self.out_features, NUMBERS.get(dtype, dtype))
            return self.run(input, autocast_type(input, self.dtype))
        except AttributeError:  # found here, as it takes no time where the input is a tensor
            check_tensor(input)
            raise

    def run(self, input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """:meth:`forward` with another type of the output."""
        needs_grad = self.needs_grad(input)
        if needs_grad and not self._trains and not torch.compiler.is_exporting():
            self._trains = self.is_trained()
        if torch.compiler.is_compiling():
            if runs_compiled(self.weight) and not needs_grad:
                return run_compiled([self], input, dtype)
            return op.run_layer(input, self.operands(), dtype)
        if is_traced() and not (self.training and self.is_trained()):
            return selection.implementation("int8_linear", input)(input, *self.operands(), dtype)
        if is_traced() or is_transformed():
            return op.transformed(input, self.operands(), dtype)
        packed = self._current_pack()
        if packed is not None and not needs_grad:
            return op.chain(input, packed, self.out_features, dtype)
        return op.run_layer(input, self.operands(), dtype, packed)

    # ---- state ------------------------------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        wrong = [
            f"{prefix}{name} {reason} in the state_dict"
            for name, own in (*self._buffers.items(), ("weight_scale", self.weight_scale))
            if own is not None and isinstance(given := state_dict.get(prefix + name), torch.Tensor)
            if (reason := _wrong_state(name, given, own))
        ]
        bias = state_dict.get(prefix + "bias")
        if isinstance(bias, torch.Tensor) and not bias.is_floating_point():
            wrong.append(f"{prefix}bias must be a float type, but is {bias.dtype} in the state_dict")
        errors.extend(dict.fromkeys(wrong))
        if wrong:
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if self.bias is not None and self.bias.dtype != torch.float32:  # assigned, not copied
            self.bias = torch.nn.Parameter(self.bias.detach().float(), self.bias.requires_grad)
        self._prepared = None

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        super()._apply(fn, recurse)
        self._prepared = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold the canonical state only.
        return {**self.__dict__, "_prepared": None}

    def extra_repr(self) -> str:
        parts = [f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"]
        parts.append(f"activation={self.activation!r}")
        if self.epilogue is not None:
            parts.append(f"epilogue={self.epilogue!r}")
        if self.granularity != "channel":
            parts.append(f"granularity={self.granularity!r}")
        return ", ".join(parts)


def runs_packed(weight: torch.Tensor) -> bool:
    """Whether layers with such weights run from their packed copy at present."""
    return weight.device.type == "cpu" and selection.chosen("int8_chain", "cpu") == "cpu"


def runs_compiled(weight: torch.Tensor) -> bool:
    """Whether compiled layers with such weights run from a packed copy. Exported ones do not: theirs is any machine."""
    return weight.device.type == "cpu" and not torch.compiler.is_exporting()


def run_compiled(layers: Sequence[Int8Linear], input: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Layers one after the other, in compiled code."""
    numbers = [number for layer in layers for number in (layer._group, layer._scheme, layer._epilogue)]
    tensors = (
        [layer.weight for layer in layers],
        [layer.weight_scale for layer in layers],
        [layer.bias for layer in layers],
        [layer.input_qparams for layer in layers],
    )
    return selection.implementation("int8_layers", input)(input, *tensors, numbers, dtype)


def _wrong_state(name: str, given: torch.Tensor, own: torch.Tensor) -> str | None:
    """What is wrong with a tensor that is to be loaded, or None. Its shape is checked by torch."""
    if given.dtype != own.dtype:  # torch would cast floats to meaningless integers
        return f"must be {own.dtype}, but is {given.dtype}"
    if given.is_meta or name == "weight":
        return None
    if not torch.isfinite(given).all():
        return "holds NaN or infinity"
    if name == "weight_scale":
        # One that was trained may have any sign.
        return None if isinstance(own, torch.nn.Parameter) or (given > 0).all() else "must be positive"
    scale, zero_point = given.tolist() if given.shape == own.shape else (0.0, 0.0)
    good = scale >= 0 and 0 <= zero_point <= 255 and zero_point == math.floor(zero_point)
    return None if good else f"must be a scale and an integer from 0 to 255, but is {(scale, zero_point)}"
