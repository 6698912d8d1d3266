"""Delimited text read in chunks, with every failure turned into one clear line."""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from .errors import DataError

# 500,000 rows of four columns are 16 MB: small beside the result, large enough to amortize a chunk.
CHUNK_ROWS = 500_000
TEXT = "utf-8-sig"  # UTF-8; spreadsheets put a byte order mark first


def open_text(path: Path, encoding: str = TEXT) -> IO[str]:
    """Opens a plain or gzip text file for reading."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=encoding)
    return open(path, encoding=encoding)


def first_line(path: Path, encoding: str = TEXT) -> str:
    """Returns the first line without its line break.

    Raises:
        DataError: the file is missing, unreadable, empty or not text.
    """
    try:
        with open_text(path, encoding) as file:
            line = file.readline(1 << 20)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not a text file") from None
    if not line.strip():
        raise DataError(f"{path}: is empty")
    return line.rstrip("\r\n")


def stream_table(
    path: Path,
    columns: Sequence[str],
    types: dict[str, Any],
    *,
    separator: str,
    header: bool = False,
    whole_lines: bool = False,
    encoding: str = TEXT,
) -> Iterator[pd.DataFrame]:
    """Yields the columns named in `types` in frames of at most `CHUNK_ROWS` rows.

    Args:
        path: the file; `.gz` is decompressed on the way.
        columns: all columns of the file, in order.
        types: data type of each column to keep (`str` or "category" for text).
        separator: the delimiter, one character, or "::" for MovieLens 1M.
        header: whether the first line names the columns.
        whole_lines: refuse lines with too few columns, too, which pandas would fill up with empty fields. Not for text
            in which quotes can hold separators.
        encoding: text encoding.

    Raises:
        DataError: missing, empty, of another shape, or a value that is not of its type.
    """
    found = len(first_line(path, encoding).split(separator))
    if found != len(columns):
        raise DataError(f"{path}: wrong columns: {found} of them, expected {len(columns)} ({', '.join(columns)})")
    numbers = [name for name, kind in types.items() if kind not in (str, "category")]
    opened: Any = _WholeLines(path, separator, len(columns), encoding) if whole_lines else nullcontext(path)
    empty = True
    try:
        with (
            opened as source,
            pd.read_csv(
                source,
                sep=separator,
                names=list(columns),
                header=0 if header else None,
                # With a choice of columns pandas would let lines with too many fields pass.
                usecols=None if len(types) == len(columns) else list(types),
                dtype=types,
                encoding=encoding,
                engine="c" if len(separator) == 1 else "python",
                chunksize=CHUNK_ROWS,
                keep_default_na=False,
                na_values={name: [""] for name in numbers},
                quoting=csv.QUOTE_MINIMAL if separator == "," else csv.QUOTE_NONE,
            ) as reader,
        ):
            for frame in reader:
                empty = empty and frame.empty
                yield frame
    except DataError:
        raise
    except (ValueError, OverflowError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: wrong content ({reason})") from None
    if empty:
        raise DataError(f"{path}: has a header but no rows")


class _WholeLines:
    """A text file for pandas that raises DataError at a line with too few separators.

    Counts them a block at a time: 46 million lines one by one would take longer than their parsing.
    """

    def __init__(self, path: Path, separator: str, columns: int, encoding: str) -> None:
        self._path, self._separator, self._columns = path, separator, columns
        self._file = open_text(path, encoding)
        self._rest, self._line = "", 0

    def __enter__(self) -> _WholeLines:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        return iter(self._file)

    def read(self, size: int = -1) -> str:
        text = self._file.read(size)
        whole, newline, self._rest = (self._rest + text).rpartition("\n") if text else (self._rest, "\n", "")
        lines = whole.count("\n") + 1 if newline else 0
        if whole.count(self._separator) != lines * (self._columns - 1):
            self._check(whole)
        self._line += lines
        return text

    def _check(self, lines: str) -> None:
        for number, line in enumerate(lines.split("\n"), self._line + 1):
            if line.strip(" \r") and line.count(self._separator) < self._columns - 1:
                raise DataError(f"{self._path}: line {number}: has fewer than {self._columns} columns")


def read_table(path: Path, columns: Sequence[str], types: dict[str, Any], **options: Any) -> pd.DataFrame:
    """All frames of `stream_table` in one."""
    return pd.concat(list(stream_table(path, columns, types, **options)), ignore_index=True)


def check_range(path: Path, name: str, values: np.ndarray, low: float, high: float, first_row: int = 1) -> None:
    """Raises DataError naming the first value outside [low, high] (or not a number) and its line.

    Args:
        path: file that the values came from.
        name: column name.
        values: float array [N].
        low, high: allowed range, inclusive.
        first_row: which line of the file `values[0]` is from, blank ones (which are skipped) not counted.
    """
    wrong = ~((values >= low) & (values <= high))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        line = line_number(path, row + first_row)
        raise DataError(f"{path}: line {line}: {name} {values[row]:g} is outside {low:g} to {high:g}")


def line_number(path: Path, number: int) -> int:
    """The line on which the `number`-th line that is not blank stands, both counted from 1."""
    with open_text(path, "latin-1") as file:  # latin-1 decodes every byte, and blank lines look the same as in UTF-8
        filled = (line for line, text in enumerate(file, 1) if text.strip(" \r\n"))
        return next(itertools.islice(filled, number - 1, None), number)
