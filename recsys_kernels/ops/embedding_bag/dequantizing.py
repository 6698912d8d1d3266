"""Quantized embedding tables for models that also read ``table.weight`` as floats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .autograd import quantized_embedding_bag
from .quantized import QuantizedEmbedding, QuantizedEmbeddingBag
from .spec import BagSpec

_TENSOR: Any = torch.Tensor
# Functions that read no values: the sizes and the type of a tensor answer them.
_METADATA = frozenset(
    (
        *(getattr(_TENSOR, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad")),
        *(getattr(_TENSOR, name).__get__ for name in ("is_cuda", "is_leaf", "grad", "grad_fn", "is_sparse", "is_meta")),
        *(_TENSOR.size, _TENSOR.dim, _TENSOR.numel, _TENSOR.nelement, _TENSOR.__len__, _TENSOR.element_size),
        *(_TENSOR.is_floating_point, _TENSOR.is_complex, torch.is_floating_point, torch.is_complex, torch.numel),
    )
)
_INTEGERS = (torch.int64, torch.int32)
# Writes whose names do not end with an underscore.
_WRITES = frozenset(("__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__"))


class DequantizedWeight(torch.Tensor):
    """The float values of a quantized table, computed when something reads them.

    A plain tensor is the result of every operation on it. Sizes and the type cost nothing; a lookup of some rows
    (``weight[ids]``, ``weight[:n]``, ``torch.nn.functional.embedding(ids, weight)``) dequantizes these rows; any other
    operation dequantizes the whole table, once for each read of ``table.weight``. Values cannot be written.
    """

    _table: QuantizedEmbedding | QuantizedEmbeddingBag
    _dequantized: torch.Tensor | None

    @staticmethod
    def __new__(cls, table: QuantizedEmbedding | QuantizedEmbeddingBag) -> DequantizedWeight:
        size, device = (table.num_embeddings, table.embedding_dim), table.stored_rows.device
        new: Any = torch.Tensor._make_wrapper_subclass(cls, size, dtype=table.dtype, device=device)
        new._table, new._dequantized = table, None
        return new

    def all_rows(self) -> torch.Tensor:
        """All values, [num_embeddings, embedding_dim]."""
        if self._dequantized is None:
            self._dequantized = self._table.dequantize()
        return self._dequantized

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Some rows, [*ids.shape, embedding_dim]; negative ids count from the end, as torch's indices do."""
        if self._dequantized is not None:
            return self._dequantized[ids]
        return _looked_up(self._table, torch.where(ids < 0, ids + self._table.num_embeddings, ids))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if _writes(func, args, kwargs):
            raise _read_only(func)
        if func == _TENSOR.data.__get__:  # a write into ``weight.data`` is refused, too
            return args[0]
        lookup = _LOOKUPS.get(func)
        if lookup is not None and (found := lookup(*args, **kwargs)) is not None:
            return found
        return func(*_plain(args), **_plain(kwargs))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if _writes(func, args, kwargs or {}):
            raise _read_only(func)
        return func(*_plain(args), **_plain(kwargs or {}))


def _looked_up(table: QuantizedEmbedding | QuantizedEmbeddingBag, ids: torch.Tensor) -> torch.Tensor:
    """The rows of a table, [*ids.shape, embedding_dim]."""
    spec = BagSpec(0, -1, False)
    out = quantized_embedding_bag(table.table, ids.reshape(-1, 1), None, None, spec, table.dtype)
    return out.reshape(*ids.shape, table.embedding_dim)


def _plain(tree: Any) -> Any:
    """Arguments with the values in place of dequantized weights."""
    return pytree.tree_map_only(DequantizedWeight, DequantizedWeight.all_rows, tree)


def _writes(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call writes to a dequantized weight."""
    if isinstance(kwargs.get("out"), DequantizedWeight):
        return True
    name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    written = args[0] if args else next(iter(kwargs.values()), None)
    return in_place and isinstance(written, DequantizedWeight)


def _read_only(func: Any) -> RuntimeError:
    name = getattr(func, "__name__", str(func))
    return RuntimeError(
        f"{name}: this weight is computed from quantized rows at every read, so it cannot be written to"
    )


def _by_index(weight: Any, index: Any) -> torch.Tensor | None:
    """``weight[index]`` of one index over rows; None for any other index."""
    if not isinstance(weight, DequantizedWeight):
        return None
    device = weight._table.stored_rows.device
    if isinstance(index, slice):
        return weight.rows(torch.arange(*index.indices(weight._table.num_embeddings), device=device))
    if isinstance(index, torch.Tensor) and type(index) is torch.Tensor and index.dtype in _INTEGERS:
        return weight.rows(index.to(device)) if index.dim() else weight.rows(index.reshape(1).to(device))[0]
    return None


def _by_index_select(input: Any, dim: int, index: torch.Tensor) -> torch.Tensor | None:
    return _by_index(input, index) if dim in (0, -2) and index.dim() == 1 and not _has_negative(index) else None


def _by_embedding(
    input: torch.Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor | None:
    return None if max_norm is not None or _has_negative(input) else _by_index(weight, input)


def _has_negative(index: torch.Tensor) -> bool:
    """Whether torch would refuse an index that ``weight[index]`` takes."""
    return bool(index.numel() and index.min() < 0)


_LOOKUPS: dict[Any, Callable[..., torch.Tensor | None]] = {
    _TENSOR.__getitem__: _by_index,
    _TENSOR.index_select: _by_index_select,
    torch.index_select: _by_index_select,
    torch.nn.functional.embedding: _by_embedding,
}


def _float_weight(self: Any) -> torch.Tensor:
    rows = self._buffers.get("weight")
    if rows is None:
        raise AttributeError("weight")
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or rows.is_meta:
        # A single lookup, which the graph can hold.
        return _looked_up(self, torch.arange(self.num_embeddings, device=rows.device))
    return DequantizedWeight(self)


class DequantizingEmbedding(QuantizedEmbedding):
    """A :class:`~recsys_kernels.QuantizedEmbedding` whose ``weight`` reads as floats.

    ``rk.optimize`` makes it where a model reads the weight of a table itself (``user @ self.items.weight.T``). The
    stored bytes and the ``state_dict`` are those of the base class. ``weight`` is a :class:`DequantizedWeight`
    [num_embeddings, embedding_dim] of type ``dtype``, read-only, computed at each read.
    """

    weight = property(_float_weight)


class DequantizingEmbeddingBag(QuantizedEmbeddingBag):
    """A :class:`~recsys_kernels.QuantizedEmbeddingBag` whose ``weight`` reads as floats.

    See :class:`DequantizingEmbedding`.
    """

    weight = property(_float_weight)
