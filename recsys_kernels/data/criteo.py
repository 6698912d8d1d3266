"""Criteo click logs: a label, 13 integers and 26 hashed categories a line, tab-separated, in time order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import DataError
from .examples import UNKNOWN, Bags, Dataset, DenseFeature, Schema, Vocabulary
from .features import check_labels
from .tables import check_range, first_line, line_number, stream_table

INTEGERS = [f"I{i}" for i in range(1, 14)]
CATEGORIES = [f"C{i}" for i in range(1, 27)]
COLUMNS = ["label", *INTEGERS, *CATEGORIES]
# A rarer value has too few labels to learn from, and would cost a row all the same.
MIN_COUNT = 5


def is_criteo(path: Path) -> bool:
    """Whether the first line has the 40 tab-separated columns of a labelled Criteo log."""
    return first_line(path).count("\t") == len(COLUMNS) - 1


def read_criteo(path: Path, limit: int | None = None, shares: tuple[float, float] = (0.8, 0.1)) -> Dataset:
    """Streams a Criteo log (plain or .gz) into examples.

    The text is never held as a whole, the numbers are: 160 bytes a line, 270 while they are converted, and about 100
    bytes for each distinct value; some 16 GB for the 46 million lines of the Kaggle log. ``limit`` bounds it.

    Args:
        path: the file; lines are in time order, as Criteo publishes them.
        limit: stop after so many lines.
        shares: parts of the lines for training and validation; the rest is the test.

    Raises:
        DataError: missing, empty, wrong columns, a label other than 0 or 1, too few lines.
    """
    labels, dense, codes, tokens = _collect(path, limit)
    count = len(labels)
    first, second = (int(count * share) for share in np.cumsum(shares))
    if not 0 < first < second < count:
        raise DataError(f"{path}: {count} lines cannot be split into training, validation and test")
    check_labels(str(path), labels, (first, second))
    features = []
    for column, name in enumerate(INTEGERS):
        feature = DenseFeature(name, log=True).fit(dense[:first, column])
        dense[:, column] = feature.scale(dense[:, column])
        features.append(feature)
    bags, vocabularies = {}, {}
    for name in CATEGORIES:
        vocabularies[name], rows = _frequent(codes[name][:first], tokens[name])
        bags[name] = Bags(rows[codes[name]])
    schema = Schema(features, [(name, name) for name in CATEGORIES], vocabularies)
    return Dataset(path.name, schema, dense, bags, labels, (first, second))


def _collect(
    path: Path, limit: int | None
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], dict[str, list[str]]]:
    """(labels [N], integers [N, 13] with NaN where empty, value number of each category [N], its values)."""
    types: dict[str, Any] = {"label": np.float32}
    types |= dict.fromkeys(INTEGERS, np.float32) | dict.fromkeys(CATEGORIES, "category")
    labels, dense = [], []
    codes: dict[str, list[np.ndarray]] = {name: [] for name in CATEGORIES}
    numbers: dict[str, dict[str, int]] = {name: {"": 0} for name in CATEGORIES}
    count = 0
    for frame in stream_table(path, COLUMNS, types, separator="\t", whole_lines=True):
        frame = frame.iloc[: limit - count] if limit else frame
        label = frame["label"].to_numpy()
        check_range(path, "label", label, 0, 1, count + 1)
        if ((label != 0) & (label != 1)).any():
            row = int(np.flatnonzero((label != 0) & (label != 1))[0])
            line = line_number(path, count + row + 1)
            raise DataError(f"{path}: line {line}: label {label[row]:g} is not 0 or 1")
        labels.append(label)
        dense.append(frame[INTEGERS].to_numpy(np.float32))
        for name in CATEGORIES:
            known = numbers[name]
            # Python handles only the distinct values of a chunk.
            chunk = [known.setdefault(str(value), len(known)) for value in frame[name].cat.categories]
            place = np.array(chunk, np.int32)
            codes[name].append(place[frame[name].cat.codes.to_numpy()])
        count += len(frame)
        if limit and count >= limit:
            break
    columns = {name: np.concatenate(parts) for name, parts in codes.items()}
    return (
        np.concatenate(labels),
        np.concatenate(dense),
        columns,
        {name: list(known) for name, known in numbers.items()},
    )


def _frequent(train_codes: np.ndarray, tokens: list[str]) -> tuple[Vocabulary, np.ndarray]:
    """(values seen at least MIN_COUNT times in training, value number -> table row int32)."""
    counts = np.bincount(train_codes, minlength=len(tokens))
    counts[0] = 0  # an empty field is unknown, not a value
    kept = np.flatnonzero(counts >= MIN_COUNT)
    rows = np.full(len(tokens), UNKNOWN, np.int32)
    rows[kept] = np.arange(1, len(kept) + 1)
    return Vocabulary(tokens[number] for number in kept), rows
