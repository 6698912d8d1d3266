"""Whether what was made of a layer's tensors still stands for them: the one place that decides this.

A packed copy is made of tensors that anybody can replace or write to. Torch counts most writes (``Tensor._version``),
but not all: ``tensor.data = other`` is seen by the address, and fused optimizers write to parameters without counting,
so that the values of trained parameters are compared. Writes through ``tensor.data`` or ``tensor.numpy()`` leave no
trace but the values. To compare all of them would take as long as the product itself, so that only the first KiB of
weights, bias, scales and range is compared (0.1 us each): a write to a whole tensor is seen, a write to single numbers
behind the first KiB is not, and needs the layer's ``refresh()``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

T = TypeVar("T")
_COMPARED_BYTES = 1024
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor as integers, which compare as equal where both hold NaN."""
    return tensor.detach().view(_BITS[tensor.element_size()])


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether two tensors hold the same, NaN included."""
    return x.dtype == y.dtype and torch.equal(_bits(x), _bits(y))


def _memory(tensor: torch.Tensor) -> ctypes.Array[ctypes.c_char] | None:
    """The first bytes of a tensor as they are at any time; None where they are out of reach.

    Valid as long as the tensor has the address that it has now.
    """
    size = min(tensor.numel() * tensor.element_size(), _COMPARED_BYTES)
    if not size or tensor.device.type != "cpu" or not tensor.is_contiguous() or type(tensor) not in _PLAIN:
        return None
    return (ctypes.c_char * size).from_address(tensor.data_ptr())


# A subclass, as a fake tensor, may have no memory.
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _first_bytes(tensor: torch.Tensor | None) -> tuple[ctypes.Array[ctypes.c_char] | None, bytes | None]:
    """The memory of the first bytes of a tensor, and what stands there now."""
    memory = None if tensor is None else _memory(tensor)
    return memory, None if memory is None else memory.raw


def count_writes(module: torch.nn.Module) -> None:
    """Replaces inference tensors of a module, which do not count what is written to them, by tensors that do."""
    with torch.inference_mode(False):
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_inference():
                module._buffers[name] = buffer.clone()
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.is_inference():
                module._parameters[name] = torch.nn.Parameter(parameter.clone(), parameter.requires_grad)


def trained(module: torch.nn.Module) -> list[torch.Tensor]:
    """The parameters of a module that an optimizer may write to."""
    return [parameter for parameter in module._parameters.values() if parameter is not None and parameter.requires_grad]


class _Mark(NamedTuple):
    """What a tensor is recognized by, apart from its identity."""

    version: int
    address: int


def _mark(tensor: torch.Tensor | None) -> _Mark:
    return _Mark(0, 0) if tensor is None else _Mark(tensor._version, tensor.data_ptr())


class Prepared(Generic[T]):
    """Something that was made of up to six tensors of a layer.

    Attributes:
        value: what was made.
        trained: the bits of the layer's trained parameters, as views of their memory and as copies; None while nothing
            is trained.

    Args:
        value: what was made.
        tensors: the tensors, the weights first; None for one that the layer does not have. None of them is an inference
            tensor, which does not count what is written to it. The first bytes of the first four are compared.
        trained: the layer's parameters, where an optimizer may write to them.
    """

    __slots__ = ("_seen", "trained", "value")

    def __init__(
        self, value: T, tensors: Sequence[torch.Tensor | None], trained: Sequence[torch.Tensor] | None = None
    ) -> None:
        self.value = value
        # The views are made once: to make them at every call would cost a request of one row 1.5 us.
        views = None if trained is None else tuple(map(_bits, trained))
        self.trained = None if views is None else (views, tuple(view.clone() for view in views))
        padded = (*tensors, *[None] * (6 - len(tensors)))
        known = [part for tensor in padded for part in (tensor, *_mark(tensor))]
        self._seen: tuple[Any, ...] = (*known, *(part for tensor in padded[:4] for part in _first_bytes(tensor)))

    def is_fresh(
        self,
        a: torch.Tensor,
        b: torch.Tensor | None,
        c: torch.Tensor | None,
        d: torch.Tensor | None,
        e: torch.Tensor | None = None,
        f: torch.Tensor | None = None,
    ) -> bool:
        """Whether these are the tensors that :attr:`value` was made of, and none was written to since.

        The trained parameters are compared by :meth:`has_values`.
        """
        # One comparison after the other: a request of one row takes 3 us in all.
        (
            ta, va, pa, tb, vb, pb, tc, vc, pc, td, vd, pd, te, ve, pe, tf, vf, pf,
            memory_a, bits_a, memory_b, bits_b, memory_c, bits_c, memory_d, bits_d,
        ) = self._seen  # fmt: skip
        return (
            a is ta
            and b is tb
            and c is tc
            and d is td
            and e is te
            and f is tf
            and a._version == va
            and a.data_ptr() == pa
            and (b is None or (b._version == vb and b.data_ptr() == pb))
            and (c is None or (c._version == vc and c.data_ptr() == pc))
            and (d is None or (d._version == vd and d.data_ptr() == pd))
            and (e is None or (e._version == ve and e.data_ptr() == pe))
            and (f is None or (f._version == vf and f.data_ptr() == pf))
            # After the addresses: the memory is only there while its tensor has its address.
            and (memory_a is None or memory_a.raw == bits_a)
            and (memory_b is None or memory_b.raw == bits_b)
            and (memory_c is None or memory_c.raw == bits_c)
            and (memory_d is None or memory_d.raw == bits_d)
        )

    def has_values(self, trained: Sequence[torch.Tensor]) -> bool:
        """Whether trained parameters hold what they held when :attr:`value` was made.

        Ask :meth:`is_fresh` before: the views are of the parameters' memory as long as these are at their addresses.
        """
        known = self.trained
        return known is not None and len(known[0]) == len(trained) and all(map(torch.equal, *known))


# ---- compiled code --------------------------------------------------------------------------------------------------


class _Entry(Generic[T]):
    """What was made of tensors that the entry does not keep alive."""

    def __init__(self, value: T, tensors: Sequence[torch.Tensor | None], numbers: tuple[int, ...]) -> None:
        self.value, self._numbers = value, numbers
        self._tensors = tuple(None if tensor is None else TensorWeakRef(tensor) for tensor in tensors)
        self._marks = tuple(map(_mark, tensors))
        self._first_bytes = tuple(map(_first_bytes, tensors))
        # Fused optimizers write to parameters without counting it.
        self._trained = tuple(t.detach().clone() if t is not None and t.requires_grad else None for t in tensors)

    def is_fresh(self, tensors: Sequence[torch.Tensor | None], numbers: tuple[int, ...]) -> bool:
        """Whether the value was made of these, and none was written to since."""
        if numbers != self._numbers or len(tensors) != len(self._tensors):
            return False
        seen = zip(tensors, self._tensors, self._marks, self._trained, self._first_bytes, strict=True)
        for tensor, known, mark, values, (memory, bits) in seen:
            if tensor is None or known is None:
                if tensor is not known:
                    return False
                continue
            if known() is not tensor or _mark(tensor) != mark or (memory is not None and memory.raw != bits):
                return False
            if tensor.requires_grad and (values is None or not same_bits(tensor, values)):
                return False
        return True


class PreparedByTensor(Generic[T]):
    """What was made of layers, found again by their tensors: for compiled code.

    A module compares its tensors with those that something was made of. Compiled code can't: what it reads of a tensor
    is fixed when it is traced, but for the tensor's values. So the comparison is part of an operator, which gets the
    tensors at every call. An entry goes with the tensor that stands first.
    """

    # Layers can share their weights: the last few entries of a tensor are kept.
    _MOST = 4

    def __init__(self) -> None:
        self._entries = WeakTensorKeyDictionary()

    def get(self, tensors: Sequence[torch.Tensor | None], numbers: tuple[int, ...], make: Callable[[], T]) -> T:
        """What :func:`make` gave for these tensors and numbers, or gives now.

        Args:
            tensors: what a call got, the weights first.
            numbers: the other operands.
            make: makes it of the tensors as they are now.
        """
        first = tensors[0]
        # An inference tensor does not count what is written to it.
        if first is None or any(tensor is not None and tensor.is_inference() for tensor in tensors):
            return make()
        entries: list[_Entry[T]] = self._entries.setdefault(first, [])
        for entry in entries:
            if entry.is_fresh(tensors, numbers):
                return entry.value
        value = make()
        entries[:] = [_Entry(value, tensors, numbers), *entries[: self._MOST - 1]]
        return value

    def value_of(self, first: torch.Tensor) -> T | None:
        """What was made last for weights, fresh or not."""
        entries: list[_Entry[T]] = self._entries.get(first, [])
        return entries[0].value if entries else None

    def __len__(self) -> int:
        return len(self._entries)
