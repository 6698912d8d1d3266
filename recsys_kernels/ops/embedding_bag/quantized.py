"""Embedding tables with int8 or int4 rows."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from ...backends import selection
from . import drop_in, memory
from .autograd import quantized_embedding_bag
from .bag import EmbeddingBag
from .spec import BagSpec, QuantizedTable

_BITS = (8, 4)
_MAX_EXPONENT = 126
# Rows dequantized at a time by to_float.
_BLOCK_ROWS = 1 << 18


def _table_exponent(weight: torch.Tensor) -> int:
    """The power of two that brings the table's largest magnitude to [2^13, 2^14).

    Scale and bias are kept as float16: relative to the table, so that neither tables of 1e-6 (many recommenders
    initialise with a deviation of 1e-4) nor of 1e6 lose precision.
    """
    if weight.numel() == 0:
        return 0
    low, high = weight.aminmax()
    largest = max(abs(low.item()), abs(high.item()))
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    return min(_MAX_EXPONENT, max(-_MAX_EXPONENT, math.frexp(largest)[1] - 14))


def _canonical(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor alone in its memory, without gaps. (A view of a single row counts as contiguous.)"""
    alone = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone or tensor.is_meta else tensor.clone(memory_format=torch.contiguous_format)


def _scale_fault(scale_bias: Any) -> str | None:
    """Names the fault of a state_dict's scales and biases, or None. Both must be finite, and scales at least 0."""
    if not isinstance(scale_bias, torch.Tensor) or scale_bias.is_meta or scale_bias.dim() != 2:
        return None  # a wrong shape is torch's to say
    bad = ~torch.isfinite(scale_bias).all(1)
    if scale_bias.shape[1]:
        bad |= scale_bias[:, 0] < 0
    if not bad.any():
        return None
    row = int(bad.nonzero()[0])
    values = ", ".join(f"{value:g}" for value in scale_bias[row].tolist())
    return f"must hold finite values and no negative scale, but row {row} of the table has (scale, bias) = ({values})"


class _Quantized(torch.nn.Module):
    """What the quantized modules share: the table, its state and its conversion."""

    weight: torch.Tensor
    scale_bias: torch.Tensor
    exponent: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int,
        padding_idx: int | None,
        dtype: torch.dtype,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        if bits not in _BITS:
            raise ValueError(f"bits must be 8 or 4, but is {bits!r}")
        if num_embeddings < 0 or embedding_dim < 1:
            raise ValueError(f"a table of {num_embeddings} x {embedding_dim} cannot be quantized")
        self.num_embeddings, self.embedding_dim, self.bits = num_embeddings, embedding_dim, bits
        self.padding_idx, self.dtype = padding_idx, dtype
        columns = embedding_dim if bits == 8 else (embedding_dim + 1) // 2
        rows, scale_bias = memory.empty_quantized(num_embeddings, columns, device=device)
        self.register_buffer("weight", rows)
        self.register_buffer("scale_bias", scale_bias)
        with torch.inference_mode(False):  # an inference tensor counts no writes
            self.register_buffer("exponent", torch.zeros((), dtype=torch.int64, device="cpu"))
        self._seen_exponent: tuple[torch.Tensor | None, int, int] = (None, 0, 0)

    def _quantize(self, weight: torch.Tensor) -> None:
        weight = weight.detach()
        exponent = _table_exponent(weight)
        self.exponent.fill_(exponent)
        run = selection.implementation("quantize_rowwise", weight)
        run(weight, self.bits, exponent, self.stored_rows, self.scale_bias)
        self.host_exponent()

    def host_exponent(self) -> int:
        """The buffer ``exponent`` as an int, read anew only when the buffer was replaced or written to.

        Compiled code takes what was last seen outside of it, since reading a tensor would break the graph.
        """
        if torch.compiler.is_compiling():
            return self._seen_exponent[2]
        buffer = self._buffers["exponent"]
        assert buffer is not None
        known, version, value = self._seen_exponent
        if known is not buffer or buffer.is_inference() or buffer._version != version:
            buffer, version = self.exponent_mark()
            value = int(buffer)
            self._seen_exponent = (buffer, version, value)
        return value

    def exponent_mark(self) -> tuple[torch.Tensor, int]:
        """The buffer ``exponent`` and its version, by which a change can be seen later."""
        if not torch.compiler.is_compiling() and self.exponent.is_inference():
            # An inference tensor has no version.
            with torch.inference_mode(False):
                self.exponent = self.exponent.clone()
        return self.exponent, 0 if torch.compiler.is_compiling() else self.exponent._version

    @property
    def table(self) -> QuantizedTable:
        """The table as the operators take it."""
        # Straight from the dict: nn.Module's attribute access costs a tenth of a small lookup.
        buffers = self._buffers
        weight, scale_bias = buffers["weight"], buffers["scale_bias"]
        assert weight is not None
        assert scale_bias is not None
        return QuantizedTable(weight, scale_bias, self.host_exponent(), self.embedding_dim, self.bits)

    @property
    def stored_rows(self) -> torch.Tensor:
        """The buffer ``weight``: the quantized rows, also where a subclass gives floats as its ``weight``."""
        rows = self._buffers["weight"]
        assert rows is not None
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of memory that rows, scales and biases hold."""
        rows, scales = self.stored_rows.untyped_storage(), self.scale_bias.untyped_storage()
        together = rows.data_ptr() == scales.data_ptr() and not self.stored_rows.is_meta
        return rows.nbytes() if together else rows.nbytes() + scales.nbytes()

    def dequantize(self) -> torch.Tensor:
        """The whole table as floats, [num_embeddings, embedding_dim] of type ``self.dtype``."""
        out = memory.empty(self.num_embeddings, self.embedding_dim, dtype=self.dtype, device=self.stored_rows.device)
        spec = BagSpec(0, -1, False)
        for start in range(0, self.num_embeddings, _BLOCK_ROWS):
            end = min(start + _BLOCK_ROWS, self.num_embeddings)
            ids = torch.arange(start, end, device=self.stored_rows.device).unsqueeze(1)
            out[start:end] = quantized_embedding_bag(self.table, ids, None, None, spec, self.dtype)
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # How rows are laid out in memory is of this machine, not of the format.
        for name in ("weight", "scale_bias"):
            destination[prefix + name] = _canonical(destination[prefix + name])

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
        # A float table would be cast to meaningless integers, and without strict loading nobody would know.
        for name, buffer in self._buffers.items():
            given = state_dict.get(prefix + name)
            if buffer is not None and isinstance(given, torch.Tensor) and given.dtype != buffer.dtype:
                errors.append(f"{prefix}{name} must be {buffer.dtype}, but is {given.dtype} in the state_dict")
                return
        exponent = state_dict.get(prefix + "exponent")
        if isinstance(exponent, torch.Tensor) and not exponent.is_meta and abs(int(exponent)) > _MAX_EXPONENT:
            errors.append(f"{prefix}exponent must be within {_MAX_EXPONENT}, but is {int(exponent)} in the state_dict")
            return
        fault = _scale_fault(state_dict.get(prefix + "scale_bias"))
        if fault is not None:
            errors.append(f"{prefix}scale_bias of the state_dict {fault}")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.host_exponent()

    def _apply(self, fn: Any, recurse: bool = True) -> _Quantized:
        # .half() and .to(dtype) choose the type of the output; the stored table has its own types. Moving to another
        # device moves it, and the exponent, which the host reads, stays where it is.
        before, exponent, scale_bias = self.stored_rows.data_ptr(), self.exponent, self.scale_bias
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        self.exponent = torch.zeros_like(exponent, device="cpu") if exponent.is_meta else exponent
        device = self.stored_rows.device
        # Off the meta device there is nothing to copy from.
        moves = not scale_bias.is_meta or device.type == "meta"
        self.scale_bias = scale_bias.to(device) if moves else torch.empty_like(scale_bias, device=device)
        if self.stored_rows.data_ptr() != before:
            self._lay_out()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> _Quantized:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        memory.use_huge_pages(new.stored_rows)
        return new

    def __getstate__(self) -> dict[str, Any]:
        # Files hold the table in its canonical form: rows and scales can share memory here, which pickle does not keep
        # and torch.save refuses.
        state = self.__dict__.copy()
        if not self.stored_rows.is_shared():  # a process that gets shared memory must get that, not a copy
            state["_buffers"] = {k: b if b is None else _canonical(b) for k, b in self._buffers.items()}
        state["_seen_exponent"] = (None, 0, self._seen_exponent[2])
        return state

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        self._lay_out()

    def _lay_out(self) -> None:
        """Moves a table that was copied or loaded as a whole into the layout of this machine."""
        if (
            self.stored_rows.device.type != "cpu" or self.stored_rows.is_shared()
        ):  # shared memory stays where others see it
            return
        rows, scale_bias = memory.empty_quantized(self.num_embeddings, self.stored_rows.shape[1])
        if (rows.stride(), scale_bias.stride()) == (self.stored_rows.stride(), self.scale_bias.stride()):
            own = self.scale_bias.untyped_storage().data_ptr() == self.stored_rows.untyped_storage().data_ptr()
            if own == (scale_bias.untyped_storage().data_ptr() == rows.untyped_storage().data_ptr()):
                memory.use_huge_pages(self.stored_rows)
                return
        self.weight, self.scale_bias = rows.copy_(self.stored_rows), scale_bias.copy_(self.scale_bias)

    def extra_repr(self) -> str:
        parts = [f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"]
        if self.padding_idx is not None:
            parts.append(f"padding_idx={self.padding_idx}")
        return ", ".join(parts)


class QuantizedEmbeddingBag(_Quantized):
    """``torch.nn.EmbeddingBag`` over int8 or int4 rows: a quarter or an eighth of the bytes. For inference.

    Each row has a scale and a bias of its own (row-wise asymmetric quantization, as in FBGEMM and in Guan et al.,
    "Post-Training 4-bit Quantization on Embedding Tables", 2019), kept as float16 relative to a power of two for the
    whole table. The error of an element is at most half a step of its row: range / 510 (int8) or / 30 (int4), and a
    little more where a row's values lie far from zero for their range, as the bias has the 11 bits of a float16.

    ``weight`` holds integers: code that reads the ``weight`` of an embedding as floats can't use this module.

    Buffers (``state_dict``): ``weight`` uint8 [num_embeddings, embedding_dim] (int4: [..., ceil(embedding_dim / 2)],
    the even element in the low half of a byte), ``scale_bias`` float16 [num_embeddings, 2], ``exponent`` int64
    scalar. An element is ``(q * scale + bias) * 2**exponent``.

    Args:
        num_embeddings, embedding_dim, mode, padding_idx, include_last_offset: as in ``torch.nn.EmbeddingBag``.
        bits: 8 or 4.
        dtype: type of the output. Sums are taken in float32.
        device: where the table lives.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        spec = drop_in.bag_spec(mode, padding_idx, include_last_offset, num_embeddings)
        padding_idx = None if padding_idx is None else spec.padding_idx
        super().__init__(num_embeddings, embedding_dim, bits, padding_idx, dtype, device)
        self._spec = spec
        self.mode, self.include_last_offset = mode, include_last_offset

    @classmethod
    def from_float(cls, bag: torch.nn.EmbeddingBag, bits: int = 8) -> QuantizedEmbeddingBag:
        """Quantizes a float bag, without a second float copy of its table. The bag itself is not changed.

        Raises:
            TypeError: not such a module.
            ValueError: ``bits`` is not 8 or 4, or a row holds NaN or infinity (named).
            NotImplementedError: the bag has ``max_norm``, which would change rows at every lookup.
        """
        if not isinstance(bag, torch.nn.EmbeddingBag):
            raise TypeError(f"bag must be a torch.nn.EmbeddingBag, but is a {type(bag).__name__}")
        if bag.max_norm is not None:
            raise NotImplementedError("a bag with max_norm changes its rows at every lookup and can't be quantized")
        weight = bag.weight
        new = cls(
            bag.num_embeddings,
            bag.embedding_dim,
            bits,
            bag.mode,
            bag.include_last_offset,
            bag.padding_idx,
            weight.dtype,
            weight.device,
        )
        new._quantize(weight)
        return new.train(bag.training)

    def to_float(self) -> EmbeddingBag:
        """A float bag with the dequantized rows."""
        return EmbeddingBag(
            self.num_embeddings,
            self.embedding_dim,
            mode=self.mode,
            _weight=self.dequantize(),
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        ).train(self.training)

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Looks up and pools bags: ``input`` [B, L], or [N] with ``offsets`` [B]; returns [B, embedding_dim].

        Errors are those of :func:`recsys_kernels.functional.embedding_bag`.
        """
        try:
            drop_in.check_bags(input, offsets, per_sample_weights)
        except AttributeError:
            drop_in.check_tensors(input=input, offsets=offsets, per_sample_weights=per_sample_weights)
            raise
        if per_sample_weights is not None and self.mode == "max":
            raise NotImplementedError(drop_in.NO_WEIGHTED_MAX)
        return quantized_embedding_bag(self.table, input, offsets, per_sample_weights, self._spec, self.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


class QuantizedEmbedding(_Quantized):
    """``torch.nn.Embedding`` over int8 or int4 rows: no pooling, indices of any shape. For inference.

    Format and error: see :class:`QuantizedEmbeddingBag`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bits: int = 8,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, bits, padding_idx, dtype, device)

    @classmethod
    def from_float(cls, embedding: torch.nn.Embedding, bits: int = 8) -> QuantizedEmbedding:
        """Quantizes a float embedding, without a second float copy of its table.

        Raises:
            TypeError: not such a module.
            ValueError: ``bits`` is not 8 or 4, or a row holds NaN or infinity (named).
            NotImplementedError: the embedding has ``max_norm``.
        """
        if not isinstance(embedding, torch.nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, but is a {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise NotImplementedError("an embedding with max_norm changes its rows at every lookup")
        weight = embedding.weight
        new = cls(
            embedding.num_embeddings, embedding.embedding_dim, bits, embedding.padding_idx, weight.dtype, weight.device
        )
        new._quantize(weight)
        return new.train(embedding.training)

    def to_float(self) -> torch.nn.Embedding:
        """A float embedding with the dequantized rows."""
        return torch.nn.Embedding(
            self.num_embeddings, self.embedding_dim, padding_idx=self.padding_idx, _weight=self.dequantize()
        ).train(self.training)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Looks up int32 or int64 indices of any shape; returns [*input.shape, embedding_dim].

        Raises:
            IndexError: an index that is not a row of the table; names its position in the flat input and its value. The
                class is a ``RuntimeError``, too.
            TypeError: ``input`` is not a tensor.
        """
        try:
            flat = input.reshape(-1, 1)
        except (AttributeError, TypeError):
            drop_in.check_tensors(input=input)
            raise
        rows = quantized_embedding_bag(self.table, flat, None, None, BagSpec(0, -1, False), self.dtype)
        return rows.reshape(*input.shape, self.embedding_dim)
