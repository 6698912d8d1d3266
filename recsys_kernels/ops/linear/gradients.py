"""What the gradients of linear layers share: the way back through the function that is applied to the result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from ...backends import registry
from .activation import (
    GELU,
    NONE,
    RELU,
    SIGMOID,
    SILU,
    activate,
)

# The gradients of relu and sigmoid follow from the output of the layer.
_FROM_OUTPUT = (RELU, SIGMOID)
# The gradients of gelu and silu need what went into the function. It is computed again from the input, which is held
# anyway: that costs one product and no memory.
_FROM_INPUT = (GELU, SILU)


def needs_output(activation: int) -> bool:
    """Whether the gradient of a function is computed from its result."""
    return activation in _FROM_OUTPUT


def needs_again(activation: int) -> bool:
    """Whether the gradient of a function is computed from its argument, which the layer must compute again."""
    return activation in _FROM_INPUT


def before_activation(
    grad: torch.Tensor, activation: int, out: torch.Tensor | None, again: Callable[[], torch.Tensor]
) -> torch.Tensor:
    """The gradient of what went into a layer's function, float32.

    Args:
        grad: the gradient of the layer's output.
        activation: the number of the function.
        out: the layer's output, where :func:`needs_output` says so.
        again: gives what went into the function, float32; called where :func:`needs_again` says so.
    """
    grad = grad.float()
    if activation == NONE:
        return grad
    if activation == GELU:
        return torch.ops.aten.gelu_backward(grad, again())
    if activation == SILU:
        x = again()
        if x.requires_grad:  # silu_backward has no derivative
            sigmoid = torch.sigmoid(x)
            return grad * sigmoid * (1 + x * (1 - sigmoid))
        return torch.ops.aten.silu_backward(grad, x)
    assert out is not None
    if activation == RELU:
        return torch.ops.aten.threshold_backward(grad, out.float(), 0)
    return torch.ops.aten.sigmoid_backward(grad, out.float())


# ---- transforms, tangents and second derivatives --------------------------------------------------------------------


def is_transformed() -> bool:
    """Whether a call may be differentiated forward, or transformed by ``torch.func``."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` runs the call: what was made of a layer before must not become a constant."""
    return torch._C._get_tracing_state() is not None


def straight_through(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: int,
    dtype: torch.dtype,
    exact: Callable[[torch.Tensor], torch.Tensor] | None,
) -> torch.Tensor:
    """A layer in torch's own operators, with derivatives of every kind and order.

    Args:
        input: [..., K].
        weight: float32 [N, K], what the layer's weights stand for.
        bias: [N] or None.
        activation: the number of the function.
        dtype: of the result.
        exact: from the input to what goes into the function, float32, of layers that round their input; the derivatives
            are then those of the layer that does not. None: the layer does not round.
    """
    out = F.linear(input.float(), weight, None if bias is None else bias.float())
    if exact is not None:
        out = out + (exact(input.detach()) - out.detach())
    return activate(out, activation).to(dtype)


def register_rows(name: str) -> None:
    """Lets ``vmap`` call an operator of rows ``(input [M, K], ...) -> [M, N]`` once for all entries of a batch."""
    run = registry.dispatched[name]

    def batched(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[torch.Tensor, int]:
        if in_dims[0] is not None and all(dim is None for dim in in_dims[1:]):
            rows = args[0].movedim(in_dims[0], 0)
            shape = rows.shape[:-1]
            out = run(rows.reshape(shape.numel(), rows.shape[-1]), *args[1:])
            return out.reshape(*shape, out.shape[-1]), 0
        entries = []
        for entry in range(info.batch_size):
            own = (a if dim is None else a.select(dim, entry) for a, dim in zip(args, in_dims, strict=True))
            entries.append(run(*own))
        return torch.stack(entries), 0

    torch.library.register_vmap(f"{registry.NAMESPACE}::{name}", batched, lib=registry.library)


def register_autocast(name: str) -> None:
    """Lets an operator ``(..., dtype) -> Tensor`` of packed layers give the type of autocast, as ``F.linear`` does.

    The dispatcher comes here only where autocast is on, so that calls without it take no time to ask.
    """
    run = registry.dispatched[name]
    for device in ("cpu", "cuda"):
        key = getattr(torch._C.DispatchKey, "AutocastCPU" if device == "cpu" else "AutocastCUDA")

        def cast(*args: Any, device: str = device, key: Any = key) -> torch.Tensor:
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(key)):
                return run(*args[:-1], torch.get_autocast_dtype(device))

        registry.library.impl(name, cast, key.name)


def autocast_type(input: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type of autocast where it is on, else ``dtype``."""
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)


def check_tensor(input: Any) -> None:
    """Raises TypeError unless a layer's input is a tensor."""
    if not isinstance(input, torch.Tensor):
        raise TypeError(f"input must be a Tensor, but is a {type(input).__name__}: {str(input)[:40]}")
