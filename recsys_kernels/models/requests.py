"""Raw examples as callers have them (ids as numbers, arrays as bags) in the form that `Schema` reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from recsys_kernels.data.examples import UNKNOWN, DenseFeature, Schema, Vocabulary

_SHAPE = "examples must be an iterable of dicts, one an example"
_EXAMPLE = ", such as [{'user': '196', 'item': '242'}]"


def normalize(examples: Iterable[Mapping[str, Any]], schema: Schema) -> list[dict[str, Any]]:
    """Examples with floats for dense features, tokens or lists of tokens for categorical ones.

    Names that the schema does not have stay, for `Schema.encode` to refuse. None and NaN are left out: unknown.

    Raises:
        TypeError: not an iterable of mappings, or a value of a type that its feature cannot have; names the feature.
        ValueError: a number that its feature cannot have: an infinite one, a negative count, a fraction as an id.
    """
    dense = {feature.name: feature for feature in schema.dense}
    vocabularies = {name: schema.vocabularies[table] for name, table in schema.features}
    out = []
    for example in _rows(examples):
        normal: dict[str, Any] = {}
        for name, value in example.items():
            if value is None or (isinstance(value, float) and value != value):
                continue
            if name in dense:
                normal[name] = _number(dense[name], value)
            elif name in vocabularies:
                normal[name] = _tokens(name, value, vocabularies[name])
            else:
                normal[name] = value
        out.append(normal)
    return out


def _rows(examples: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(examples, Mapping):
        raise TypeError(f"{_SHAPE}, not a {type(examples).__name__}: put a single example into a list")
    if hasattr(examples, "to_dict"):  # pandas, which need not be installed
        raise TypeError(f'{_SHAPE}, not a {type(examples).__name__}: give the DataFrame\'s .to_dict("records")')
    if isinstance(examples, (str, bytes)) or not isinstance(examples, Iterable):
        raise TypeError(f"{_SHAPE}{_EXAMPLE}, not {_kind(examples)}")
    rows = list(examples)
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"{_SHAPE}{_EXAMPLE}, but number {number} is {_kind(row)} ({row!r:.60})")
    return rows


def _number(feature: DenseFeature, value: Any) -> float:
    name = feature.name
    number = None
    if not isinstance(value, (str, bytes)) and np.ndim(value) == 0:
        with suppress(TypeError, ValueError, OverflowError):
            number = float(value)
    if number is None:
        raise TypeError(f"feature {name!r} takes a number, not {_kind(value)} ({value!r:.60})")
    if math.isinf(number):
        raise ValueError(f"feature {name!r} takes a finite number, not {number}")
    if feature.minimum is not None and number < feature.minimum:
        raise ValueError(f"feature {name!r} takes a number of at least {feature.minimum:g}, not {number:g}")
    return number


def _tokens(name: str, value: Any, vocabulary: Vocabulary) -> str | list[str]:
    if hasattr(value, "tolist"):  # values of numpy, torch and pandas become Python's own numbers, or lists of them
        value = value.tolist()
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping)):
        return [_token(name, item, vocabulary) for item in value]
    return _token(name, value, vocabulary)


def _token(name: str, value: Any, vocabulary: Vocabulary) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, str) and isinstance(value, (bytes, Iterable)):
        raise TypeError(f"feature {name!r} takes an id or a list of ids, not {_kind(value)} ({value!r:.60})")
    if value is None or (isinstance(value, float) and value != value):
        return ""  # the encoding treats this value as a missing token
    if isinstance(value, float) and vocabulary.row(value) == UNKNOWN:
        if not value.is_integer():  # infinity is not a whole number, either
            raise ValueError(f"feature {name!r} takes ids, and {value} is none: a text or a whole number")
        value = int(value)  # a column of ids with gaps is one of floats in pandas
    return str(value)


def _kind(value: object) -> str:
    """The type of a value, with its article."""
    if value is None:
        return "None"
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeio' else 'a'} {name}"
