"""Which code reads a layer's ``weight`` while a model runs."""

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
    """Within this context, notes every torch call on a layer's weight from outside of the layer's ``forward``.

    Args:
        layers: the layers to watch.
        readers: modules whose ``forward`` may read weights of the layers, as ``EmbeddingBagCollection`` does.

    Attributes:
        found: id of the weight -> where it is read.
    """

    def __init__(self, layers: Collection[Any], readers: Collection[torch.nn.Module] = ()) -> None:
        super().__init__()
        self.found: dict[int, str] = {}
        self._weights = {id(layer.weight) for layer in layers}
        self._watched = (*layers, *readers)
        self._inside = 0
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> WeightWatch:
        for module in self._watched:
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
