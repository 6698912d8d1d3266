"""The drop-in for ``torch.nn.EmbeddingBag``."""

from __future__ import annotations

from typing import Any

import torch

from . import autograd, drop_in, memory


class EmbeddingBag(torch.nn.EmbeddingBag):
    """``torch.nn.EmbeddingBag`` on fused kernels.

    Same constructor, parameters, ``state_dict`` and initial values. On the CPU the table is allocated on 2 MiB pages.
    ``per_sample_weights`` work for ``"mean"``, too (the weighted sum over the bag's size). ``max_norm`` and
    ``scale_grad_by_freq`` run through torch's own operator.

    Shapes, types and errors: see :func:`recsys_kernels.functional.embedding_bag`.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        own = _weight is None
        if own:
            size = (num_embeddings, embedding_dim)
            _weight = memory.empty(*size, dtype=dtype or torch.get_default_dtype(), device=device)
        super().__init__(
            num_embeddings,
            embedding_dim,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            mode,
            sparse,
            _weight,
            include_last_offset,
            padding_idx,
            device,
            dtype,
        )
        if own:
            self.reset_parameters()

    def forward(
        self,
        input: torch.Tensor,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Looks up and pools bags: ``input`` [B, L], or [N] with ``offsets`` [B]; returns [B, embedding_dim]."""
        try:
            if (
                per_sample_weights is None
                and self.max_norm is None
                and not (self.scale_grad_by_freq or input.is_nested)
            ):
                # A shorter form of the call below, for the usual case: a request spends as long on Python as on rows.
                drop_in.check_bags(input, offsets, None)
                if (self.mode != "max" or not self.sparse) and not torch.compiler.is_compiling():
                    spec = drop_in.cached_bag_spec(
                        self.mode, self.padding_idx, self.include_last_offset, self.num_embeddings
                    )
                    return autograd.embedding_bag(self.weight, input, offsets, None, spec, self.sparse)
        except AttributeError:
            drop_in.check_tensors(input=input, offsets=offsets)
            raise
        return drop_in.embedding_bag(
            input,
            self.weight,
            offsets,
            self.max_norm,
            self.norm_type,
            self.scale_grad_by_freq,
            self.mode,
            self.sparse,
            per_sample_weights,
            self.include_last_offset,
            self.padding_idx,
        )

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingBag:
        # .to() and .half() allocate anew, on 4 KiB pages.
        before = self.weight.data_ptr()
        super()._apply(fn, recurse)
        if self.weight.data_ptr() != before:
            memory.use_huge_pages(self.weight)
        return self

    def __setstate__(self, state: Any) -> None:
        # Copies and loaded modules, too, come on 4 KiB pages.
        super().__setstate__(state)
        memory.use_huge_pages(self.weight)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # torch would cast the integers of a quantized table to floats, and without strict loading nobody would know.
        given = state_dict.get(prefix + "weight")
        if isinstance(given, torch.Tensor) and not given.is_floating_point():
            args[-1].append(f"{prefix}weight must hold floats, but is {given.dtype} in the state_dict")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
