"""Many embedding tables in one call."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch

from . import drop_in
from .autograd import transforms_active
from .bag import EmbeddingBag
from .collection_autograd import embedding_bag_collection
from .faults import IndexOutOfRangeError
from .quantized import QuantizedEmbeddingBag
from .reference import MODES
from .spec import CollectionBags, FeaturePlan, TableLists

FeatureInput = Mapping[str, tuple[torch.Tensor, torch.Tensor | None] | torch.Tensor]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _refresh_after_load(module: EmbeddingBagCollection, _: Any) -> None:
    module._refresh_plan()


@dataclass(frozen=True)
class EmbeddingBagConfig:
    """One table of an :class:`EmbeddingBagCollection`; the names are TorchRec's.

    Attributes:
        name: name of the table, unique in the collection; no dots.
        num_embeddings: rows.
        embedding_dim: columns.
        feature_names: the features looked up in this table, each with its own columns in the output. Default: one
            feature with the name of the table.
        pooling: ``"sum"``, ``"mean"`` or ``"max"``.
        weight_dtype: floating-point type of the rows, or of the output of integer rows; None takes the collection's.
        bits: 8 or 4 for integer rows, whose values are still to be loaded; None for floats.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    feature_names: Sequence[str] | None = None
    pooling: str = "sum"
    weight_dtype: torch.dtype | None = None
    bits: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in MODES:
            raise ValueError(f"pooling of table {self.name!r} must be 'sum', 'mean' or 'max', but is {self.pooling!r}")
        if self.num_embeddings < 1 or self.embedding_dim < 1:
            raise ValueError(
                f"table {self.name!r} must have rows and columns, but is {self.num_embeddings} x {self.embedding_dim}"
            )
        if not self.name or "." in self.name:
            raise ValueError(f"a table's name must not be empty or hold a dot, but is {self.name!r}")
        if self.feature_names is not None and not self.feature_names:
            raise ValueError(f"feature_names of table {self.name!r} must not be empty")
        if self.bits not in (None, 8, 4):
            raise ValueError(f"bits of table {self.name!r} must be 8, 4 or None, but is {self.bits!r}")
        if self.weight_dtype is not None:
            _check_dtype(f"weight_dtype of table {self.name!r}", self.weight_dtype)

    @property
    def features(self) -> tuple[str, ...]:
        """The names of the features looked up in this table."""
        return (self.name,) if self.feature_names is None else tuple(self.feature_names)


def _check_dtype(what: str, dtype: torch.dtype) -> None:
    if dtype not in _FLOATS:
        raise ValueError(
            f"{what} must be float64, float32, float16 or bfloat16, but is {dtype}; bits=8 gives int8 rows"
        )


def _new_bag(
    config: EmbeddingBagConfig, weight_dtype: torch.dtype, device: torch.device | str | None
) -> EmbeddingBag | QuantizedEmbeddingBag:
    rows, dim, mode, dtype = config.num_embeddings, config.embedding_dim, config.pooling, config.weight_dtype
    if config.bits is None:
        return EmbeddingBag(rows, dim, mode=mode, device=device, dtype=dtype or weight_dtype)
    return QuantizedEmbeddingBag(rows, dim, mode=mode, bits=config.bits, device=device, dtype=dtype or weight_dtype)


class _Operands(NamedTuple):
    """The tensors of a call, and the marks by which a later call sees whether the tables still hold them."""

    tables: TableLists  # without scales when every table is float
    own_scales: list[torch.Tensor]
    dtypes: list[torch.dtype]
    exponents: list[tuple[torch.Tensor, int] | None]  # buffer and its version; None for a float table
    dtype: torch.dtype


class EmbeddingBagCollection(torch.nn.Module):
    """Any number of embedding tables, looked up and pooled in one call.

    Tables may differ in rows, columns, type and pooling, and several features may share one. Parameters are named as
    in TorchRec: ``embedding_bags.<table>.weight``.

    Args:
        tables: their configs, in the order of the output's columns.
        weight_dtype: type of tables whose config names none: float64, float32, float16 or bfloat16.
        device: where the tables live.

    Attributes:
        embedding_bags: ``nn.ModuleDict`` of one (possibly quantized) bag a table.
        feature_names: the F features in the order of the input and of the output's columns.
        output_dim: sum over features of their embedding_dim.
    """

    def __init__(
        self,
        tables: Sequence[EmbeddingBagConfig],
        weight_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check_dtype("weight_dtype", weight_dtype)
        self._build(tables, {t.name: _new_bag(t, weight_dtype, device) for t in tables})

    def _build(self, tables: Sequence[EmbeddingBagConfig], bags: Mapping[str, torch.nn.Module]) -> None:
        self.tables = tuple(tables)
        if not self.tables:
            raise ValueError("a collection needs at least one table")
        names = [t.name for t in self.tables]
        self.feature_names = tuple(name for t in self.tables for name in t.features)
        for what, values in (("table", names), ("feature", self.feature_names)):
            twice = sorted({v for v in values if list(values).count(v) > 1})
            if twice:
                raise ValueError(f"{what} names must be unique, but {twice[0]!r} occurs more than once")
        self.embedding_bags = torch.nn.ModuleDict()
        # Not through add_module, which refuses names of its own methods: tables called "items" or "type" are common.
        self.embedding_bags._modules.update(bags)
        self._table_of_feature = tuple(t.name for t in self.tables for _ in t.features)
        self.output_dim = sum(t.embedding_dim * len(t.features) for t in self.tables)
        self.register_buffer("_plan", torch.empty(0), persistent=False)
        self._refresh_plan()
        self.register_load_state_dict_post_hook(_refresh_after_load)

    def _refresh_plan(self) -> None:
        """Makes the plan: the table and the columns of each feature. Called again whenever a table has changed."""
        features, column = [], 0
        for number, (config, bag) in enumerate(zip(self.tables, self._bags(), strict=True)):
            bits, exponent = (bag.bits, bag.host_exponent()) if isinstance(bag, QuantizedEmbeddingBag) else (0, 0)
            for _ in config.features:
                dim = config.embedding_dim
                features.append(FeaturePlan(number, dim, column, MODES[config.pooling], bits, exponent))
                column += dim
        self._features = tuple(features)
        device = self._bags()[0].weight.device
        with torch._C._DisableFuncTorch():  # a tensor that is made in a torch.func transform ends with it
            self._plan = torch.tensor([list(f) for f in features], dtype=torch.int64, device=device)
            self._empty = torch.empty(0, dtype=torch.float16, device=device)
        self._known: _Operands | None = None

    def _bags(self) -> list[EmbeddingBag | QuantizedEmbeddingBag]:
        return cast("list[EmbeddingBag | QuantizedEmbeddingBag]", list(self.embedding_bags.values()))

    @property
    def nbytes(self) -> int:
        """Bytes that all tables hold."""
        return sum(bag.nbytes if isinstance(bag, QuantizedEmbeddingBag) else bag.weight.nbytes for bag in self._bags())

    def table(self, name: str) -> torch.Tensor:
        """The rows of a table: its parameter, or the uint8 rows of a quantized one (a view, not a copy).

        Raises:
            KeyError: no such table.
        """
        if name not in self.embedding_bags:
            raise KeyError(f"no table {name!r}; the tables are {', '.join(self.embedding_bags)}")
        return cast(torch.Tensor, self.embedding_bags[name].weight)

    def quantize(self, bits: int | Mapping[str, int] = 8) -> EmbeddingBagCollection:
        """A new collection with int8 or int4 rows (for inference); this one is not changed.

        Args:
            bits: 8 or 4, or a mapping from table names to 8 or 4; tables that it does not name are shared as they
                are. Quantized tables stay as they are.
        """
        chosen = dict(bits) if isinstance(bits, Mapping) else dict.fromkeys(self.embedding_bags, bits)
        unknown = sorted(set(chosen) - set(self.embedding_bags))
        if unknown:
            raise KeyError(f"no table {unknown[0]!r}; the tables are {', '.join(self.embedding_bags)}")
        bags = {
            name: QuantizedEmbeddingBag.from_float(bag, chosen[name])
            if name in chosen and isinstance(bag, torch.nn.EmbeddingBag)
            else bag
            for name, bag in self.embedding_bags.items()
        }
        new = EmbeddingBagCollection.__new__(EmbeddingBagCollection)
        torch.nn.Module.__init__(new)
        bits_of = {name: bag.bits if isinstance(bag, QuantizedEmbeddingBag) else None for name, bag in bags.items()}
        new._build([replace(t, bits=bits_of[t.name]) for t in self.tables], bags)
        return new.train(self.training)

    def forward(
        self,
        indices: torch.Tensor | FeatureInput,
        offsets: torch.Tensor | None = None,
        per_sample_weights: torch.Tensor | None = None,
        include_last_offset: bool = False,
    ) -> torch.Tensor:
        """Looks up and pools every feature.

        Args:
            indices: int32 or int64 [N], feature-major: all bags of the first feature, then of the second, as in
                FBGEMM and TorchRec. Or a mapping from every feature's name to its ``(indices [N], offsets [B])`` as
                for ``torch.nn.EmbeddingBag``, or to ``indices [B, L]``, alone or as ``(indices [B, L], None)``.
            offsets: int32 or int64 [F * B + 1]; None with a mapping.
            per_sample_weights: one factor an index, [N]; of no effect on max pooled features.
            include_last_offset: the offsets in a mapping have B + 1 entries.

        Returns:
            [B, output_dim]; features side by side in the order of ``feature_names``. The type is the tables' common
            type (quantized tables count with their output type), float32 when they differ.

        Raises:
            ValueError: missing or unknown features, batch sizes that differ.
            TypeError: a list in the place of a tensor, or a feature of a mapping is neither a pair nor a tensor.
            IndexError: an index out of range; names table, feature, position, value and range. The class is a
                ``RuntimeError``, too.
            RuntimeError: wrong types or offsets, or tensors on several devices.
        """
        if not isinstance(indices, torch.Tensor):
            if not isinstance(indices, Mapping):
                raise TypeError(
                    "indices must be a tensor or a mapping from features to (indices, offsets), but is of type "
                    f"{type(indices).__name__}: torch.as_tensor(indices) makes a tensor"
                )
            if offsets is not None or per_sample_weights is not None:
                raise ValueError("offsets and per_sample_weights don't go with a mapping of features")
            indices, offsets = self._join(indices, include_last_offset)
        elif offsets is None:
            raise ValueError(f"offsets must be a tensor of F*B+1 entries (F = {len(self.feature_names)})")
        if torch.compiler.is_compiling():
            return self._lookup(indices, offsets, per_sample_weights)
        try:
            return self._lookup(indices, offsets, per_sample_weights)
        except IndexError as error:
            raise IndexOutOfRangeError(self._with_names(str(error))) from None
        except (AttributeError, RuntimeError):
            drop_in.check_tensors(offsets=offsets, per_sample_weights=per_sample_weights)
            raise

    def _lookup(
        self, indices: torch.Tensor, offsets: torch.Tensor, per_sample_weights: torch.Tensor | None
    ) -> torch.Tensor:
        operands = self._operands()
        bags = CollectionBags(indices, offsets, per_sample_weights)
        return embedding_bag_collection(operands.tables, self._features, bags, self.output_dim, operands.dtype)

    def _operands(self) -> _Operands:
        """The tensors of a call, gathered anew only when a table has changed: that took longer than a request."""
        if torch.compiler.is_compiling():
            return self._gather()
        known = self._known
        if known is None or not all(self._is_known(known)):
            self._refresh_plan()
            known = self._gather()
            # The tables of a torch.func transform end with it, and could not be copied.
            self._known = None if transforms_active() else known
        return known

    def _gather(self) -> _Operands:
        bags = self._bags()
        quantized = [isinstance(bag, QuantizedEmbeddingBag) for bag in bags]
        dtypes = [bag.dtype if isinstance(bag, QuantizedEmbeddingBag) else bag.weight.dtype for bag in bags]
        scales = [bag.scale_bias if isinstance(bag, QuantizedEmbeddingBag) else self._empty for bag in bags]
        exponents = [bag.exponent_mark() if isinstance(bag, QuantizedEmbeddingBag) else None for bag in bags]
        plan = cast(torch.Tensor, self._buffers["_plan"])
        return _Operands(
            TableLists([bag.weight for bag in bags], scales if any(quantized) else [], plan),
            scales,
            dtypes,
            exponents,
            dtypes[0] if len(set(dtypes)) == 1 else torch.float32,
        )

    def _is_known(self, known: _Operands) -> list[bool]:
        """For each table whether ``known`` still holds its tensors, output type and exponent."""
        modules = cast("Iterable[Any]", self.embedding_bags._modules.values())
        parts = zip(modules, known.tables.weights, known.own_scales, known.dtypes, known.exponents, strict=True)
        # Straight from the dicts: nn.Module's attribute access would double a request over many tables.
        return [
            bag._parameters.get("weight") is weight and weight.dtype is dtype
            if exponent is None
            else bag._buffers.get("weight") is weight
            and bag._buffers["scale_bias"] is scale
            and bag.dtype is dtype
            and bag._buffers["exponent"] is exponent[0]
            and exponent[0]._version == exponent[1]
            for bag, weight, scale, dtype, exponent in parts
        ]

    def _with_names(self, message: str) -> str:
        if message.endswith("(found by an earlier call)"):  # which may have been another collection's
            return message

        def name(match: re.Match[str]) -> str:
            feature = int(match[1])
            return f"table {self._table_of_feature[feature]!r} (feature {self.feature_names[feature]!r})"

        return re.sub(r"the table of feature #(\d+)", name, message)

    def _join(self, features: FeatureInput, include_last_offset: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The features of a mapping in feature-major order."""
        missing = [name for name in self.feature_names if name not in features]
        if missing:
            raise ValueError(f"missing features: {', '.join(missing)}")
        unknown = [name for name in features if name not in self.feature_names]
        if unknown:
            raise ValueError(f"unknown features: {', '.join(unknown)}")
        ids: list[torch.Tensor] = []
        starts: list[torch.Tensor] = []
        before = 0
        for name in self.feature_names:
            own, offsets = self._pair(name, features[name])
            if offsets is None:
                if own.dim() != 2:
                    raise ValueError(f"feature {name!r} has no offsets, so its indices must be 2-D, each row a bag")
                offsets = torch.arange(own.shape[0], device=own.device) * own.shape[1]
            elif own.dim() != 1 or offsets.dim() != 1:
                raise ValueError(f"indices and offsets of feature {name!r} must be 1-D")
            else:
                own, offsets = self._cut(name, own, offsets, include_last_offset)
            if starts and offsets.shape[0] != starts[0].shape[0]:
                raise ValueError(
                    f"feature {name!r} has {offsets.shape[0]} bags, but feature {self.feature_names[0]!r} has "
                    f"{starts[0].shape[0]}"
                )
            ids.append(own.reshape(-1))
            starts.append(offsets.long() + before)
            before += own.numel()
        starts.append(starts[0].new_full((1,), before))
        return torch.cat(ids), torch.cat(starts)

    @staticmethod
    def _pair(name: str, value: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The indices and offsets that a mapping has for a feature."""
        if isinstance(value, torch.Tensor):
            if value.dim() == 2:
                return value, None
            raise ValueError(f"feature {name!r} is a {value.dim()}-D tensor without offsets; give (indices, offsets)")
        if isinstance(value, (tuple, list)) and len(value) == 3:
            raise TypeError(
                f"feature {name!r} has three parts; a mapping takes no per_sample_weights: give all features joined"
            )
        if not isinstance(value, (tuple, list)) or len(value) != 2:
            raise TypeError(f"feature {name!r} must be (indices, offsets), but is {type(value).__name__}")
        for what, part in zip(("indices", "offsets"), value, strict=True):
            if not (isinstance(part, torch.Tensor) or (part is None and what == "offsets")):
                raise TypeError(f"{what} of feature {name!r} must be a tensor, but is {type(part).__name__}")
        return value[0], value[1]

    @staticmethod
    def _cut(
        name: str, indices: torch.Tensor, offsets: torch.Tensor, include_last_offset: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The indices that belong to the bags, and where these begin: joined features must not run into each other."""
        if torch.compiler.is_compiling():
            torch._assert_async(torch.all(offsets[:1] == 0), f"offsets of feature {name!r} must start at 0")
            if include_last_offset:
                torch._assert_async(torch.all(offsets[-1:] == indices.shape[0]), f"offsets of {name!r} end too early")
                offsets = offsets[:-1]
            return indices, offsets
        if offsets.shape[0] and int(offsets[0]) != 0:
            raise RuntimeError(f"offsets of feature {name!r} must start at 0, but start at {int(offsets[0])}")
        if not include_last_offset:
            return (indices, offsets) if offsets.shape[0] else (indices[:0], offsets)
        if offsets.shape[0] == 0:
            raise RuntimeError(f"include_last_offset needs at least one offset of feature {name!r}")
        end = int(offsets[-1])
        if not 0 <= end <= indices.shape[0]:
            raise RuntimeError(
                f"offsets of feature {name!r} must not exceed its {indices.shape[0]} indices, but end at {end}"
            )
        return indices[:end], offsets[:-1]

    def _apply(self, fn: Any, recurse: bool = True) -> EmbeddingBagCollection:
        for table, bag in zip(self.tables, self._bags(), strict=True):
            if isinstance(bag, QuantizedEmbeddingBag) and fn(torch.empty(0, dtype=bag.dtype)).dtype == torch.float64:
                raise TypeError(
                    f"a collection with integer rows (table {table.name!r}) has no float64 output; use float32, or "
                    "to_float() of the table's bag"
                )
        super()._apply(fn, recurse)
        self._refresh_plan()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_known": None}

    def extra_repr(self) -> str:
        return f"features={len(self.feature_names)}, output_dim={self.output_dim}, nbytes={self.nbytes:,}"
