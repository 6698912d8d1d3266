"""A run of int8 layers in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd import forward_ad

from ....backends import selection
from ..gradients import autocast_type, check_tensor, is_traced, is_transformed
from ..prepared import Prepared, count_writes
from ..sequence import LinearSequence, check_widths
from . import autograd as op
from .layer import CHAIN, NUMBERS, RUN_CHAIN, Int8Linear, run_compiled, runs_compiled, runs_packed

if TYPE_CHECKING:
    from ..qat import QATMLP

EPILOGUES: dict[type[torch.nn.Module], str] = {
    torch.nn.ReLU: "relu",
    torch.nn.GELU: "gelu",
    torch.nn.Sigmoid: "sigmoid",
    torch.nn.SiLU: "silu",
}


class Int8MLP(LinearSequence):
    """:class:`Int8Linear` layers one after the other, on the CPU in one call.

    Between the layers values are float32, whatever the type of the output, which is that of the last layer. On other
    devices, and where a gradient is needed, the layers run one by one.

    State (``state_dict``): that of the layers, under their numbers.

    Args:
        layers: each as wide as the one before it gives.

    Raises:
        TypeError: not such a layer.
        ValueError: no layer, or widths that do not fit.
    """

    def __init__(self, *layers: Int8Linear) -> None:
        super().__init__(*layers)
        self._check_layers()
        self._forget()

    def _forget(self) -> None:
        self._prepared: list[tuple[Int8Linear, Prepared[None]]] = []
        self._packed: torch.Tensor | None = None

    @classmethod
    def from_float(
        cls,
        mlp: torch.nn.Sequential,
        activation: str = "dynamic",
        *,
        granularity: str | int = "channel",
        input_ranges: Sequence[tuple[float, float]] | None = None,
    ) -> Int8MLP:
        """Quantizes a ``torch.nn.Sequential`` and folds its activation functions into the layers.

        Args:
            mlp: of Linear, ReLU, GELU (erf), Sigmoid, SiLU, Dropout and Identity, and of such Sequentials. At most one
                function after each Linear. Dropout and Identity are left out.
            activation, granularity: see :class:`Int8Linear`; the same for every layer.
            input_ranges: (low, high) of the input of each Linear, for ``"static"``.

        Raises:
            TypeError: not a Sequential, or one with another module (named).
            ValueError: no Linear, a function that can't be folded (named), or input_ranges of another length; and what
                :meth:`Int8Linear.from_float` raises.
        """
        steps = _checked_steps(mlp, input_ranges)
        if activation == "static" and input_ranges is None:
            raise ValueError("activation='static' needs input_ranges, the range of each layer's input")
        layers = [
            Int8Linear.from_float(
                linear,
                activation,
                epilogue=epilogue,
                granularity=granularity,
                input_range=None if input_ranges is None else input_ranges[number],
            )
            for number, (linear, epilogue) in enumerate(steps)
        ]
        return cls(*layers).train(mlp.training)

    @classmethod
    def qat(
        cls,
        mlp: torch.nn.Sequential,
        activation: str = "dynamic",
        *,
        granularity: str | int = "channel",
        ranges: str = "running",
        input_ranges: Sequence[tuple[float, float]] | None = None,
        momentum: float = 0.1,
    ) -> QATMLP:
        """A trainable MLP for quantization-aware training; its ``convert()`` gives the deployed one, bit for bit.

        Args:
            mlp: as for :meth:`from_float`; it is not changed. Dropout stays for the time of the training, after the
                function that the layer before it is followed by.
            activation, granularity, ranges, momentum: see :meth:`Int8Linear.qat`; the same for every layer.
            input_ranges: (low, high) of the input of each Linear to start from, for ``"static"``.

        Raises:
            TypeError, ValueError: what :meth:`from_float` and :meth:`Int8Linear.qat` raise.
        """
        from ..qat import QATMLP

        steps = _checked_steps(mlp, input_ranges)
        modules: list[torch.nn.Module] = []
        number = 0
        for _, module in _flat(mlp):
            if isinstance(module, torch.nn.Linear):
                known = None if input_ranges is None else input_ranges[number]
                options = {"granularity": granularity, "ranges": ranges, "input_range": known, "momentum": momentum}
                modules.append(Int8Linear.qat(module, activation, epilogue=steps[number][1], **options))  # type: ignore[arg-type]
                number += 1
            elif isinstance(module, torch.nn.Dropout):
                modules.append(torch.nn.Dropout(module.p))
        return QATMLP(*modules).train(mlp.training)

    def to_float(self) -> torch.nn.Sequential:
        """The layers with dequantized weights, and their functions, in one Sequential."""
        modules: list[torch.nn.Module] = []
        for layer in self._layers():
            new = layer.to_float()
            modules.extend(new) if isinstance(new, torch.nn.Sequential) else modules.append(new)
        return torch.nn.Sequential(*modules).train(self.training)

    def _layers(self) -> list[Int8Linear]:
        return list(self._modules.values())  # type: ignore[arg-type]

    def _check_layers(self) -> None:
        layers = self._layers()
        if not layers:
            raise ValueError("an Int8MLP needs at least one layer")
        for number, layer in enumerate(layers):
            if not isinstance(layer, Int8Linear):
                raise TypeError(f"layer {number} must be an Int8Linear, but is a {type(layer).__name__}")
        check_widths(layers, Int8Linear)

    def _is_fresh(self, layers: list[Int8Linear]) -> bool:
        """Whether the layers are the packed ones, and none of their tensors was replaced or written to since."""
        known = self._prepared
        if len(layers) != len(known):
            return False
        for layer, (packed_layer, prepared) in zip(layers, known):  # noqa: B905 (strict=True takes time)
            if layer is not packed_layer or not layer.is_fresh(prepared):
                return False
        return True

    def _current_pack(self, layers: list[Int8Linear]) -> torch.Tensor:
        """The packed layers, as fresh as their state."""
        packed = self._packed
        if packed is None or not self._is_fresh(layers):
            self._packed = None
            for layer in layers:
                count_writes(layer)
            with torch.inference_mode(False):
                packed = torch.cat([layer.pack() for layer in layers])
            if type(packed) is torch.Tensor:  # not a fake one
                self._packed, self._prepared = packed, [(layer, layer.prepare(None)) for layer in layers]
        return packed

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features of the first layer] to [..., out_features of the last]; errors as in :class:`Int8Linear`.

        Hooks of the layers are not called where all of them run in one call.
        """
        check_tensor(input)
        layers = self._layers()
        last = layers[-1]
        # Tangents are computed as gradients are: layer by layer.
        needs_grad = (torch.is_grad_enabled() and _has_grad(input, layers)) or forward_ad._current_level >= 0
        if not torch.compiler.is_compiling() and not needs_grad:
            # As in Int8Linear.forward: first without what cannot apply.
            packed = self._packed
            if packed is not None and input.dim() == 2 and self._is_fresh(layers):  # noqa: SIM102
                if selection.implementation("int8_chain", input) is CHAIN:
                    dtype = last.dtype
                    return RUN_CHAIN(input, packed, last.out_features, NUMBERS.get(dtype, dtype))
        self._check_layers()
        if not needs_grad:
            if torch.compiler.is_compiling():
                if runs_compiled(last.weight):
                    return run_compiled(layers, input, autocast_type(input, last.dtype))
            elif runs_packed(last.weight) and not (is_transformed() or is_traced()):
                return op.chain(input, self._current_pack(layers), last.out_features, last.dtype)
        for layer in layers[:-1]:
            input = layer.run(input, torch.float32)
        return last(input)

    def __getstate__(self) -> dict[str, Any]:
        # Copies and files hold the canonical state only.
        return {**self.__dict__, "_prepared": [], "_packed": None}


def _checked_steps(
    mlp: torch.nn.Sequential, input_ranges: Sequence[tuple[float, float]] | None
) -> list[tuple[torch.nn.Linear, str | None]]:
    """The layers of a float MLP, of which there is at least one, and a range for each if there are ranges."""
    if not isinstance(mlp, torch.nn.Sequential):
        raise TypeError(f"mlp must be a torch.nn.Sequential, but is a {type(mlp).__name__}")
    steps = _steps(mlp)
    if not steps:
        raise ValueError("mlp holds no torch.nn.Linear")
    if input_ranges is not None and len(input_ranges) != len(steps):
        raise ValueError(f"input_ranges must have one range for each of the {len(steps)} layers")
    return steps


def _has_grad(input: torch.Tensor, layers: list[Int8Linear]) -> bool:
    return input.requires_grad or any(layer.is_trained() for layer in layers)


def _flat(modules: torch.nn.Sequential, prefix: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in modules.named_children():
        if isinstance(module, torch.nn.Sequential) and not isinstance(module, Int8MLP):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield prefix + name, module


def _steps(mlp: torch.nn.Sequential) -> list[tuple[torch.nn.Linear, str | None]]:
    """The layers of a float MLP, each with the function that follows it."""
    steps: list[tuple[torch.nn.Linear, str | None]] = []
    for name, module in _flat(mlp):
        if isinstance(module, torch.nn.Linear):
            steps.append((module, None))
        elif type(module) in EPILOGUES:
            if not steps or steps[-1][1] is not None:
                raise ValueError(f"{name} ({module}) does not follow a Linear, so that it can't be folded into one")
            if isinstance(module, torch.nn.GELU) and module.approximate != "none":
                raise ValueError(f"{name} ({module}) is not the exact function, which is the one that layers have")
            steps[-1] = (steps[-1][0], EPILOGUES[type(module)])
        elif not isinstance(module, torch.nn.Dropout | torch.nn.Identity):
            raise TypeError(f"{name} is a {type(module).__name__}, which an Int8MLP can't hold")
    return steps
