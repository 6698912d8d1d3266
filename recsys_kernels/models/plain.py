"""The same DLRM on plain torch modules: what a compressed model is compared with."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from torch import nn

from recsys_kernels.data.examples import Batch

from .dlrm import DLRM


class PlainInput(NamedTuple):
    """dense [B, num_dense]; one (indices, offsets [B]) pair a feature, as `nn.EmbeddingBag` takes them."""

    dense: torch.Tensor
    bags: list[tuple[torch.Tensor, torch.Tensor]]


class PlainDLRM(nn.Module):
    """A float32 `DLRM` with the same weights, a Python loop over `torch.nn.EmbeddingBag`s for the lookup.

    Args:
        model: where the weights come from; they are copied.
    """

    def __init__(self, model: DLRM) -> None:
        super().__init__()
        self.head = copy.deepcopy(model.head)  # torch modules already
        self.bags = nn.ModuleDict()
        self.owners = [table.name for table in model.config.tables for _ in table.features]
        for table in model.config.tables:
            weight = model.embeddings.table(table.name).detach().clone()
            self.bags[table.name] = nn.EmbeddingBag.from_pretrained(weight, mode=table.pooling)
        self.eval()

    def forward(self, dense: torch.Tensor, bags: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """Logits [B]."""
        pooled = [self.bags[owner](*bag) for owner, bag in zip(self.owners, bags, strict=True)]
        return self.head(dense, torch.cat(pooled, dim=1))

    def prepare(self, batch: Batch) -> PlainInput:
        """Splits the feature-major input by feature; not part of what is timed."""
        count = len(batch.dense)
        bags = []
        for feature in range(len(self.owners)):
            bounds = batch.offsets[feature * count : (feature + 1) * count + 1]
            first, last = int(bounds[0]), int(bounds[-1])
            bags.append((batch.indices[first:last].clone(), bounds[:-1] - first))
        return PlainInput(batch.dense, bags)


def model_input(model: nn.Module, batch: Batch) -> tuple[Any, ...]:
    """The part of a batch that `model`, a `DLRM` or a `PlainDLRM`, reads."""
    return model.prepare(batch) if isinstance(model, PlainDLRM) else batch[:3]
