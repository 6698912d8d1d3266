"""DLRM: a ranking model of dense features, embedding bags and their pairwise dot products.

Naumov et al., "Deep Learning Recommendation Model for Personalization and Recommendation Systems",
arXiv:1906.00091.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from recsys_kernels.data.examples import Schema
from recsys_kernels.ops.embedding_bag import EmbeddingBagCollection, EmbeddingBagConfig
from recsys_kernels.ops.linear.int8 import Int8Linear, Int8MLP
from recsys_kernels.ops.linear.sparse import SparseLinear, SparseMLP

# Each form of the MLPs -> how `Int8Linear` treats activations; for pruned MLPs, how `SparseLinear` treats them.
MLP_FORMS = {"float32": None, "int8": "dynamic", "int8-static": "static", "int8-weight-only": "weight_only"}
SPARSE_FORMS = {"sparse": None, "int8+sparse": "dynamic", "int8-static+sparse": "static"}


@dataclass(frozen=True)
class Table:
    """One embedding table: its rows, the features that read it, how a bag is pooled."""

    name: str
    rows: int
    features: tuple[str, ...]
    pooling: str = "mean"


@dataclass(frozen=True)
class DLRMConfig:
    """Shape of a DLRM.

    Attributes:
        num_dense: number of dense features.
        tables: the embedding tables; the batch's features follow their order.
        dim: width of every embedding row and of the bottom MLP's output.
        bottom, top: hidden widths of the two MLPs.
        dropout: share of the top MLP's hidden units dropped in training.
        embedding: data type of the rows: "float32", "int8" or "int4".
        mlp: form of the two MLPs: "float32", "int8" (activations quantized row by row), "int8-static",
            "int8-weight-only", or pruned: "sparse", "int8+sparse", "int8-static+sparse".
        mlp_pattern: how the layers of pruned MLPs are stored, see `SparseLinear`; layers of one output are stored as
            "unstructured". None for other MLPs.
    """

    num_dense: int
    tables: tuple[Table, ...]
    dim: int = 64
    bottom: tuple[int, ...] = (64,)
    top: tuple[int, ...] = (128, 64)
    dropout: float = 0.4
    embedding: str = "float32"
    mlp: str = "float32"
    mlp_pattern: str | None = None

    @classmethod
    def for_schema(cls, schema: Schema, dim: int = 64) -> DLRMConfig:
        """The shape that fits a data set."""
        features: dict[str, list[str]] = {}
        for feature, table in schema.features:
            features.setdefault(table, []).append(feature)
        tables = (Table(name, len(schema.vocabularies[name]), tuple(names)) for name, names in features.items())
        return cls(len(schema.dense), tuple(tables), dim)

    @property
    def feature_names(self) -> list[str]:
        """Features in the order in which a batch holds them."""
        return [feature for table in self.tables for feature in table.features]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, state: dict[str, Any]) -> DLRMConfig:
        """Inverse of `to_json`."""
        tables = tuple(Table(t["name"], t["rows"], tuple(t["features"]), t["pooling"]) for t in state["tables"])
        widths = {"bottom": tuple(state["bottom"]), "top": tuple(state["top"])}
        return cls(**{**state, **widths, "tables": tables})


class DLRM(nn.Module):
    """Ranking model whose tables are looked up by one `EmbeddingBagCollection` call.

    Args:
        config: the shape.
        embeddings: the tables, if they exist already; float32 ones with small random rows by default.

    Raises:
        ValueError: `config` names integers and there are no tables (see `quantize`, `with_mlps`, `load_model`).

    `forward(dense [B, num_dense] float32, indices [N] int64, offsets [F * B + 1] int64)` returns
    logits [B] float32; indices and offsets are feature-major, in the order of `config.feature_names`.
    """

    def __init__(self, config: DLRMConfig, embeddings: EmbeddingBagCollection | None = None) -> None:
        super().__init__()
        if embeddings is None and config.mlp != "float32":
            raise ValueError(f"a new model has float32 MLPs, not {config.mlp}; quantize them after training")
        self.config = config
        self.embeddings = _new_tables(config) if embeddings is None else embeddings
        self.head = Head(config)

    def forward(self, dense: torch.Tensor, indices: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return self.head(dense, self.embeddings(indices, offsets))

    def quantize(self, bits: int) -> DLRM:
        """A copy in eval mode whose tables have int8 or int4 rows (`bits` 8 or 4), scale and bias a row."""
        config = replace(self.config, embedding=f"int{bits}")
        other = DLRM(config, self.embeddings.quantize(bits))
        other.head = copy.deepcopy(self.head)
        return other.eval()

    def neurons_pruned(self) -> None:
        """Corrects the widths in ``config``; ``prune_neurons`` calls it when hidden layers got narrower."""
        self.config = replace(self.config, **self.hidden_widths())

    def hidden_widths(self) -> dict[str, Any]:
        """The hidden widths of the two MLPs as they are now, by the names that `DLRMConfig` gives them."""
        widths = {}
        for name in ("bottom", "top"):
            layers = [m for m in getattr(self.head, name).modules() if hasattr(m, "out_features")]
            widths[name] = tuple(layer.out_features for layer in layers[:-1])
        return widths

    def with_mlps(self, mlps: Sequence[nn.Module], form: str, pattern: str | None = None) -> DLRM:
        """The same model with other MLPs of the same shape; the tables are the same ones, not copies.

        Args:
            mlps: what takes the place of `head.bottom` and `head.top`.
            form, pattern: what `config.mlp` and `config.mlp_pattern` name them.
        """
        other = DLRM(replace(self.config, mlp="float32", mlp_pattern=None), self.embeddings)
        other.config = replace(self.config, mlp=form, mlp_pattern=pattern)
        other.head.bottom, other.head.top = mlps
        return other.train(self.training)


def empty_tables(config: DLRMConfig) -> EmbeddingBagCollection:
    """Tables of the right shapes and types with rows still to be loaded; no float32 copy of integer rows."""
    if config.embedding == "float32":
        return EmbeddingBagCollection(_table_configs(config), device="meta").to_empty(device="cpu")
    return EmbeddingBagCollection(_table_configs(config, int(config.embedding.removeprefix("int"))))


def _new_tables(config: DLRMConfig) -> EmbeddingBagCollection:
    """Small random rows, so that an unseen id starts near the unknown row and adds little."""
    if config.embedding != "float32":
        raise ValueError(f"a new model has float32 tables, not {config.embedding}; quantize it after training")
    tables = EmbeddingBagCollection(_table_configs(config))
    with torch.no_grad():
        for table in config.tables:
            tables.table(table.name).normal_(std=0.01)
    return tables


def _table_configs(config: DLRMConfig, bits: int | None = None) -> list[EmbeddingBagConfig]:
    return [EmbeddingBagConfig(t.name, t.rows, config.dim, t.features, t.pooling, bits=bits) for t in config.tables]


class Head(nn.Module):
    """The part of the model after the lookup: bottom MLP, pairwise dot products, top MLP.

    `forward(dense [B, num_dense], pooled [B, F * dim])` returns logits [B].
    """

    pairs: torch.Tensor

    def __init__(self, config: DLRMConfig) -> None:
        super().__init__()
        self.dim = config.dim
        self.vectors = len(config.feature_names) + 1
        count = self.vectors * (self.vectors - 1) // 2
        bottom, top = (*config.bottom, config.dim), (*config.top, 1)
        self.bottom: nn.Module
        self.top: nn.Module
        if config.mlp in SPARSE_FORMS:
            activation, pattern = SPARSE_FORMS[config.mlp], config.mlp_pattern or "unstructured"
            self.bottom = sparse_mlp(config.num_dense, bottom, activation, pattern)
            self.top = sparse_mlp(config.dim + count, top, activation, pattern, last_relu=False)
        elif (scheme := MLP_FORMS[config.mlp]) is None:
            self.bottom = mlp(config.num_dense, bottom)
            self.top = mlp(config.dim + count, top, dropout=config.dropout, last_relu=False)
        else:
            self.bottom = int8_mlp(config.num_dense, bottom, scheme)
            self.top = int8_mlp(config.dim + count, top, scheme, last_relu=False)
        rows, columns = torch.tril_indices(self.vectors, self.vectors, offset=-1)
        self.register_buffer("pairs", rows * self.vectors + columns, persistent=False)

    def forward(self, dense: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(dense)
        vectors = torch.cat((bottom, pooled), dim=1).view(-1, self.vectors, self.dim)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).flatten(1)
        return self.top(torch.cat((bottom, products.index_select(1, self.pairs)), dim=1)).squeeze(1)


def mlp(width: int, widths: Sequence[int], *, dropout: float = 0.0, last_relu: bool = True) -> nn.Sequential:
    """Linear layers with ReLU (and dropout) between them."""
    layers: list[nn.Module] = []
    for position, out in enumerate(widths):
        layers.append(nn.Linear(width, out))
        if last_relu or position + 1 < len(widths):
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
        width = out
    return nn.Sequential(*layers)


def int8_mlp(width: int, widths: Sequence[int], scheme: str, *, last_relu: bool = True) -> Int8MLP:
    """The 8-bit form of `mlp`; its values are still to be loaded."""
    layers = []
    for position, out in enumerate(widths):
        relu = last_relu or position + 1 < len(widths)
        layers.append(Int8Linear(width, out, activation=scheme, epilogue="relu" if relu else None))
        width = out
    return Int8MLP(*layers)


def sparse_mlp(
    width: int, widths: Sequence[int], activation: str | None, pattern: str, *, last_relu: bool = True
) -> SparseMLP:
    """The pruned form of `mlp`; its values are still to be loaded."""
    layers = []
    for position, out in enumerate(widths):
        relu = last_relu or position + 1 < len(widths)
        kinds = {"pattern": layer_pattern(out, pattern), "activation": activation, "epilogue": "relu" if relu else None}
        layers.append(SparseLinear(width, out, **kinds))  # type: ignore[arg-type]
        width = out
    return SparseMLP(*layers)


def layer_pattern(out_features: int, pattern: str) -> str:
    """How a layer of pruned MLPs is stored: a layer of a single output is not pruned, so that it has no pattern."""
    return pattern if out_features > 1 else "unstructured"
