"""Examples ready for a ranking model: dense features, jagged categorical features, labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch

UNKNOWN = 0  # row of every table for ids that training never saw


class Batch(NamedTuple):
    """The inputs of a model, and the labels.

    dense: float32 [B, number of dense features]; indices: int64 [N]; offsets: int64 [F * B + 1],
    feature-major (all bags of the first feature, then of the second ...); labels: float32 [B].
    """

    dense: torch.Tensor
    indices: torch.Tensor
    offsets: torch.Tensor
    labels: torch.Tensor


class Vocabulary:
    """Tokens of one table: row 0 stands for everything unknown, token i has row i + 1."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = [str(token) for token in tokens]
        self._rows = {token: row for row, token in enumerate(self.tokens, 1)}

    def __len__(self) -> int:
        """Rows of the table, the unknown row included."""
        return len(self.tokens) + 1

    def row(self, token: object) -> int:
        """Row of one token; `UNKNOWN` if training never saw it."""
        return self._rows.get(str(token), UNKNOWN)

    def rows(self, tokens: Iterable[object]) -> np.ndarray:
        """Rows of many tokens, int64 [N]."""
        return np.fromiter((self.row(token) for token in tokens), np.int64)


# Standardized values beyond this limit are cut even if no range is known: larger values overflow float32 products.
_FARTHEST = 1e6
# The range of a dense feature leaves out this share of the training rows at each end.
_TAIL = 0.005


@dataclass(frozen=True)
class DenseFeature:
    """A number: optionally log(1 + x), cut to the range of training, then standardized.

    Outside the range of the training rows a model would extrapolate: days since a first rating, for example, only
    grow. Models whose activations are quantized by ranges of training examples would then differ from the others for
    a reason that has nothing to do with quantization.

    Attributes:
        name: of the feature.
        log: whether log(1 + x) is taken first; x below 0 counts as 0.
        mean, std: of the training rows, after `log` and the cut.
        low, high: the range, after `log`; None (as in models from before there was one) cuts nothing.
        minimum: the least raw number that makes sense, such as 0 for a count; None for any.
    """

    name: str
    log: bool = False
    mean: float = 0.0
    std: float = 1.0
    low: float | None = None
    high: float | None = None
    minimum: float | None = None

    def scale(self, raw: np.ndarray) -> np.ndarray:
        """float [N] (NaN where unknown) -> float32 [N]; unknown becomes 0, the training mean."""
        with np.errstate(over="ignore"):  # infinity is cut as well
            values = (self._shape(raw) - self.mean) / self.std
        return np.nan_to_num(np.clip(values, -_FARTHEST, _FARTHEST), nan=0.0).astype(np.float32)

    def fit(self, raw: np.ndarray) -> DenseFeature:
        """The same feature with the range, mean and deviation of `raw`, which must be training rows only."""
        values = replace(self, low=None, high=None)._shape(raw)
        values = values[np.isfinite(values)]
        if not len(values):
            return replace(self, mean=0.0, std=1.0, low=None, high=None)
        low, high = (float(end) for end in np.quantile(values, (_TAIL, 1 - _TAIL)))
        values = np.clip(values, low, high)
        mean, std = float(values.mean()), float(values.std())
        constant = std <= 1e-9 * max(1.0, abs(mean))  # such a small deviation is rounding error
        return replace(self, mean=mean, std=1.0 if constant else std, low=low, high=high)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; unknown values are left out."""
        optional = {"low": self.low, "high": self.high, "minimum": self.minimum}
        known = {name: value for name, value in optional.items() if value is not None}
        return {"name": self.name, "log": self.log, "mean": self.mean, "std": self.std, **known}

    def _shape(self, raw: np.ndarray) -> np.ndarray:
        values = np.asarray(raw, np.float64)
        values = np.log1p(np.maximum(values, 0.0)) if self.log else values
        return values if self.low is None else np.clip(values, self.low, self.high)


@dataclass
class Schema:
    """The rules by which raw fields become a `Batch`: everything that a server needs besides the weights.

    Attributes:
        dense: the dense features in order.
        features: (feature, table) in the order of the batch; features that share a table are neighbours.
        vocabularies: the tokens of each table.
        bags: the features that hold any number of tokens; the others hold one.
    """

    dense: list[DenseFeature]
    features: list[tuple[str, str]]
    vocabularies: dict[str, Vocabulary]
    bags: frozenset[str] = frozenset()

    def encode(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """Turns raw examples into a batch (labels 0).

        Args:
            examples: one mapping an example: a dense feature's name to a number, a categorical
                feature's name to a token or, if it is one of `bags`, a list of tokens. What is missing is
                unknown: the training mean, the unknown row for a single token, an empty bag for a list.

        Raises:
            KeyError: a name that the model does not have.
            TypeError: a list for a feature that holds one token.
        """
        known = {feature.name for feature in self.dense} | {name for name, _ in self.features}
        for example in examples:
            for name in example:
                if name not in known:
                    raise KeyError(f"unknown feature {name!r}; the model reads {', '.join(sorted(known))}")
        count = len(examples)
        dense = np.zeros((count, len(self.dense)), np.float32)
        for column, feature in enumerate(self.dense):
            raw = [example.get(feature.name) for example in examples]
            dense[:, column] = feature.scale(np.array([np.nan if v is None else float(v) for v in raw]))
        indices: list[int] = []
        offsets = [0]
        for name, table in self.features:
            vocabulary = self.vocabularies[table]
            for example in examples:
                value = example.get(name, [] if name in self.bags else "")
                if isinstance(value, (list, tuple)) and name not in self.bags:
                    raise TypeError(f"feature {name!r} takes one value, not a list of {len(value)} ({value!r:.60})")
                tokens = value if isinstance(value, (list, tuple)) else [value]
                indices.extend(vocabulary.row(token) for token in tokens)
                offsets.append(len(indices))
        return Batch(
            torch.from_numpy(dense),
            torch.tensor(indices, dtype=torch.int64),
            torch.tensor(offsets, dtype=torch.int64),
            torch.zeros(count),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the vocabularies' tokens, as plain JSON values."""
        return {
            "dense": [feature.to_json() for feature in self.dense],
            "features": [list(pair) for pair in self.features],
            "bags": sorted(self.bags),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any], tokens: Mapping[str, Sequence[str]]) -> Schema:
        """Inverse of `to_json`, with the tokens of each table."""
        dense = [DenseFeature(**entry) for entry in state["dense"]]
        features = [(name, table) for name, table in state["features"]]
        vocabularies = {table: Vocabulary(tokens[table]) for _, table in features}
        return cls(dense, features, vocabularies, frozenset(state["bags"]))


@dataclass
class Bags:
    """One jagged feature of all examples: bag n is values[starts[n] : starts[n] + lengths[n]].

    Bags may overlap, so a history of the last items costs two numbers an example. Without `starts` every
    bag holds one value, which halves the memory of a data set with many plain columns.
    """

    values: np.ndarray
    starts: np.ndarray | None = None
    lengths: np.ndarray | None = None

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(values of the bags of `rows` one after another, their lengths)."""
        if self.starts is None or self.lengths is None:
            return self.values[rows], np.ones(len(rows), np.int64)
        lengths = self.lengths[rows].astype(np.int64)
        ends = np.cumsum(lengths)
        # An index is the position inside the bag plus the bag's start; no Python loop is needed.
        shift = np.repeat(self.starts[rows] - (ends - lengths), lengths)
        return self.values[np.arange(len(shift)) + shift], lengths


@dataclass
class Dataset:
    """Examples in time order and their split.

    Attributes:
        name: what to call it in a report.
        schema: how the fields were encoded; `bags` has the keys of `schema.features`, in that order.
        dense: float32 [N, number of dense features].
        bags: the categorical features.
        labels: float32 [N], 0 or 1.
        bounds: rows [0, bounds[0]) train, [bounds[0], bounds[1]) validate, the rest test.
        dropped: categorical features of which ids are replaced by the unknown row at random in training -> the share.
    """

    name: str
    schema: Schema
    dense: np.ndarray
    bags: dict[str, Bags]
    labels: np.ndarray
    bounds: tuple[int, int]
    dropped: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, part: str) -> np.ndarray:
        """Row numbers of "train", "validation" or "test", int64."""
        first, second = self.bounds
        low, high = {"train": (0, first), "validation": (first, second), "test": (second, len(self))}[part]
        return np.arange(low, high)

    def batch(self, rows: np.ndarray, drop: float = 0.0, random: np.random.Generator | None = None) -> Batch:
        """Collates rows.

        Args:
            rows: int64 [B].
            drop: 1 replaces the shares of ids that `dropped` names by the unknown row, which teaches the model what to
                do with users and items that it has never seen; 0.5 half of that, 0 nothing.
            random: needed when `drop` is above 0.
        """
        values, lengths = [], []
        for name, bags in self.bags.items():
            picked, count = bags.take(rows)
            if drop and random is not None and name in self.dropped:
                picked = np.where(random.random(len(picked)) < drop * self.dropped[name], UNKNOWN, picked)
            values.append(picked)
            lengths.append(count)
        offsets = np.zeros(len(rows) * len(lengths) + 1, np.int64)
        np.cumsum(np.concatenate(lengths), out=offsets[1:])
        return Batch(
            torch.from_numpy(self.dense[rows]),
            torch.from_numpy(np.concatenate(values).astype(np.int64, copy=False)),
            torch.from_numpy(offsets),
            torch.from_numpy(self.labels[rows]),
        )
