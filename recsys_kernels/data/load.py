"""Finds out what a path holds and reads it."""

from __future__ import annotations

from pathlib import Path

from .criteo import COLUMNS, is_criteo, read_criteo
from .errors import DataError
from .examples import Dataset
from .features import rating_dataset
from .fetch import movielens_100k
from .movielens import RatingLog, is_movielens, read_movielens

_LOOKS = 20  # files of an unknown folder to look into


def load_dataset(path: Path | None = None, *, cache: Path | None = None, limit: int | None = None) -> Dataset:
    """Loads the data set at `path`, whichever of the known layouts it has.

    Args:
        path: a MovieLens folder (100k, RecBole files, 1M, 20M or latest) or one of its files, or a Criteo
            TSV file (.gz too); MovieLens 100k, found or fetched, by default.
        cache: where fetched files are kept.
        limit: use at most so many rows (the latest ratings, the first lines of a Criteo log).

    Raises:
        DataError: one line that says what is wrong with the data.
    """
    if path is None:
        return rating_dataset(read_movielens(movielens_100k(cache)), limit)
    if path.is_dir():
        return rating_dataset(_read_folder(path), limit)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix in (".zip", ".tar", ".tgz"):
        raise DataError(f"{path}: is an archive; unpack it first")
    if is_parquet(path):
        raise DataError(f"{path}: is a Parquet file, which is not read here; {_AS_TEXT}")
    if is_criteo(path):
        return read_criteo(path, limit)
    if is_movielens(path.parent):
        return rating_dataset(read_movielens(path.parent), limit)
    raise DataError(
        f"{path}: wrong columns: neither a MovieLens file nor a Criteo TSV of {len(COLUMNS)} columns (label, 13 "
        "integers, 26 categories)"
    )


_AS_TEXT = (
    "write it as text first: pandas.read_parquet(PATH).to_csv('ratings.csv', index=False) with the columns userId, "
    "movieId, rating, timestamp, or a Criteo log with sep='\\t', header=False"
)


def _read_folder(path: Path) -> RatingLog:
    """The ratings in a folder. The error for an unknown folder names the files in it."""
    if is_movielens(path):
        return read_movielens(path)
    # Hidden files are leftovers of tools. The first few names tell what a folder holds.
    files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))[:_LOOKS]
    for file in files:
        if is_parquet(file):
            raise DataError(f"{path}: holds Parquet files ({file.name}), which are not read here; {_AS_TEXT}")
    if logs := [file for file in files if _is_criteo(file)]:
        raise DataError(f"{path}: is a folder with a Criteo log; name the file itself: --data {logs[0]}")
    return read_movielens(path)  # the reader's error says which files it looked for


def _is_criteo(path: Path) -> bool:
    try:
        return is_criteo(path)
    except DataError:  # the file is empty or is not text
        return False


def is_parquet(path: Path) -> bool:
    """Whether a file begins as Parquet files do."""
    try:
        with open(path, "rb") as file:
            return file.read(4) == b"PAR1"
    except OSError:  # the reader of the file reports the error
        return False
