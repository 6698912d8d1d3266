"""Finds out what a path holds and reads it."""

from __future__ import annotations

from pathlib import Path

from .criteo import COLUMNS, is_criteo, read_criteo
from .errors import DataError
from .examples import Dataset
from .features import rating_dataset
from .fetch import movielens_100k
from .movielens import is_movielens, read_movielens


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
        return rating_dataset(read_movielens(path), limit)
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix in (".zip", ".tar", ".tgz"):
        raise DataError(f"{path}: is an archive; unpack it first")
    if is_criteo(path):
        return read_criteo(path, limit)
    if is_movielens(path.parent):
        return rating_dataset(read_movielens(path.parent), limit)
    raise DataError(
        f"{path}: wrong columns: neither a MovieLens file nor a Criteo TSV of {len(COLUMNS)} columns (label, 13 "
        "integers, 26 categories)"
    )
