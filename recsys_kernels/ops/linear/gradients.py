"""What the gradients of linear layers share: the way back through the function that is applied to the result."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .activation import (
    GELU,
    NONE,
    RELU,
    SIGMOID,
    SILU,
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
        return torch.ops.aten.silu_backward(grad, again())
    assert out is not None
    if activation == RELU:
        return torch.ops.aten.threshold_backward(grad, out.float(), 0)
    return torch.ops.aten.sigmoid_backward(grad, out.float())
