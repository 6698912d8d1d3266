"""A watch for code that reads a layer's ``weight`` while a model runs."""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .source_code import HARMLESS

_TORCH = os.path.dirname(torch.__file__) + os.sep


class WeightWatch(TorchFunctionMode):
    """Within this context, notes every torch call on a weight from outside of the modules that may read it.

    Args:
        weights: the weights to watch.
        owners: the modules whose ``forward`` may read weights: the layers, and such as ``EmbeddingBagCollection``.

    Attributes:
        found: id of a weight -> the place in the code that reads it.
    """

    def __init__(self, weights: Collection[torch.Tensor], owners: Collection[torch.nn.Module]) -> None:
        super().__init__()
        self.found: dict[int, str] = {}
        self._weights = {id(weight) for weight in weights}
        self._owners = owners
        self._inside = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> WeightWatch:
        for module in self._owners:
            # Closest to forward: hooks of the user are outside.
            self._handles.append(module.register_forward_pre_hook(self._go_in))
            self._handles.append(module.register_forward_hook(self._come_out, prepend=True))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _go_in(self, *_: Any) -> None:
        self._inside += 1

    def _come_out(self, *_: Any) -> None:
        self._inside -= 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._inside and getattr(getattr(func, "__self__", None), "__name__", "") not in HARMLESS:
            for value in _flat((args, kwargs)):
                if id(value) in self._weights:
                    self.found.setdefault(id(value), _caller())
        return func(*args, **kwargs)


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


def _caller() -> str:
    """The innermost function on the stack that is neither torch's nor of this file."""
    frame = sys._getframe()
    while frame.f_back is not None:
        file = frame.f_code.co_filename
        if file != __file__ and not file.startswith(_TORCH):
            break
        frame = frame.f_back
    name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
    return f"{name} ({os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno})"
