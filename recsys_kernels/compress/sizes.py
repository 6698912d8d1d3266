"""Bytes and data types of a model's tensors."""

from __future__ import annotations

import torch
from torch.nn.parameter import is_lazy


def stored_bytes(module: torch.nn.Module) -> int:
    """The bytes of memory behind all parameters and buffers; memory that several tensors share counts once."""
    tensors = [t for t in (*module.parameters(), *module.buffers()) if not is_lazy(t) and t.layout == torch.strided]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def dtype_name(tensor: torch.Tensor) -> str:
    """The type of a tensor without ``torch.``."""
    return str(tensor.dtype).removeprefix("torch.")
