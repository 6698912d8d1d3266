"""Readers for the MovieLens files: 100k (original and RecBole format), 1M/10M, and 20M/latest.

All give the same `RatingLog`; files about users and items may be missing.

MovieLens: Harper and Konstan, "The MovieLens Datasets: History and
Context", ACM TiiS 5(4), 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from .errors import DataError
from .tables import check_range, first_line, read_table

LIKED = 4.0  # a rating from here on counts as a click
_RATINGS = (0.5, 5.0)
_GENRES_100K = [
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
]
_OCCUPATIONS_1M = [
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
]


@dataclass
class RatingLog:
    """Ratings in file order, with what is known of users and items.

    Attributes:
        name: what to call the data set in a report.
        users, items: int64 [N], positions in `user_tokens` and `item_tokens`.
        ratings: float32 [N].
        timestamps: int64 [N], seconds.
        user_tokens, item_tokens: the ids as they stand in the files.
        age: float32 per user, NaN where unknown; None where the files have no users.
        user_fields: feature name -> one token per user ("" where unknown).
        year: float32 per item, NaN where unknown.
        genres: one tuple of tokens per item.
    """

    name: str
    users: np.ndarray
    items: np.ndarray
    ratings: np.ndarray
    timestamps: np.ndarray
    user_tokens: list[str]
    item_tokens: list[str]
    age: np.ndarray | None = None
    user_fields: dict[str, list[str]] = field(default_factory=dict)
    year: np.ndarray | None = None
    genres: list[tuple[str, ...]] | None = None


def read_movielens(folder: Path) -> RatingLog:
    """Reads whichever MovieLens layout `folder` holds.

    Raises:
        DataError: no known layout, or a file of it that cannot be used.
    """
    for marker, reader in _LAYOUTS.items():
        if next(folder.glob(marker), None) is not None:
            return reader(folder)
    raise DataError(
        f"{folder}: no known data set; looked for u.data (MovieLens 100k), *.inter (RecBole files), ratings.dat "
        "(MovieLens 1M or 10M), ratings.csv (MovieLens 20M or latest)"
    )


def is_movielens(folder: Path) -> bool:
    """Whether a marker file of one of the layouts lies in `folder`."""
    return any(next(folder.glob(marker), None) is not None for marker in _LAYOUTS)


def _read_100k(folder: Path) -> RatingLog:
    log = _ratings(
        folder / "u.data",
        read_table(folder / "u.data", ["user", "item", "rating", "timestamp"], _RATING_TYPES, separator="\t"),
        "MovieLens 100k",
    )
    columns = ["user", "age", "gender", "occupation", "zip"]
    text = dict.fromkeys(columns, str)
    path = folder / "u.user"
    if path.exists():
        _add_users(log, read_table(path, columns, text, separator="|", encoding="latin-1"))
    columns = ["item", "title", "date", "video_date", "url", *_GENRES_100K]
    path = folder / "u.item"
    if not path.exists():
        return log
    items = read_table(path, columns, dict.fromkeys(columns, str), separator="|", encoding="latin-1")
    flags = items[list(_GENRES_100K)].to_numpy() == "1"
    names = np.array(_GENRES_100K)
    genres = [tuple(names[row]) for row in flags]
    _add_items(log, items["item"], items["date"].str[-4:], genres)
    return log


def _read_recbole(folder: Path) -> RatingLog:
    inter = sorted(folder.glob("*.inter"))[0]
    frame = _typed(inter, {"user_id": str, "item_id": str, "rating": np.float32, "timestamp": np.float64})
    log = _ratings(inter, frame.rename(columns={"user_id": "user", "item_id": "item"}), inter.stem, first_row=2)
    if inter.stem == "ml-100k":
        log.name = "MovieLens 100k"
    users = inter.with_suffix(".user")
    if users.exists():
        frame = _typed(users, {"user_id": str}, {"age": str, "gender": str, "occupation": str})
        _add_users(log, frame.rename(columns={"user_id": "user"}))
    items = inter.with_suffix(".item")
    if items.exists():
        frame = _typed(items, {"item_id": str}, {"release_year": str, "class": str, "genre": str, "genres": str})
        kinds = next((frame[name] for name in ("class", "genre", "genres") if name in frame), None)
        genres = None if kinds is None else [tuple(text.split()) for text in kinds]
        _add_items(log, frame["item_id"], frame.get("release_year"), genres)
    return log


def _read_1m(folder: Path) -> RatingLog:
    # The delimiter "::" needs pandas' slow parser; a single colon with empty columns between does not.
    path = folder / "ratings.dat"
    _require_columns(path, first_line(path).split("::"), 4)
    columns = ["user", "_1", "item", "_2", "rating", "_3", "timestamp"]
    log = _ratings(path, read_table(path, columns, _RATING_TYPES, separator=":"), folder.name)
    path = folder / "users.dat"
    if path.exists():  # MovieLens 10M has none
        log.name = "MovieLens 1M"
        columns = ["user", "gender", "age", "occupation", "zip"]
        users = read_table(path, columns, dict.fromkeys(columns, str), separator="::", encoding="latin-1")
        known = dict(enumerate(_OCCUPATIONS_1M))
        users["occupation"] = [known.get(int(code), code) if code.isdigit() else code for code in users["occupation"]]
        _add_users(log, users)
    path = folder / "movies.dat"
    if path.exists():
        columns = ["item", "title", "genres"]
        items = read_table(path, columns, dict.fromkeys(columns, str), separator="::", encoding="latin-1")
        _add_titled_items(log, items)
    return log


def _read_20m(folder: Path) -> RatingLog:
    path = folder / "ratings.csv"
    frame = _headed(path, {"userId": np.int64, "movieId": np.int64, "rating": np.float32, "timestamp": np.int64})
    log = _ratings(path, frame.rename(columns={"userId": "user", "movieId": "item"}), folder.name, first_row=2)
    path = folder / "movies.csv"
    if path.exists():
        items = _headed(path, {"movieId": str, "title": str, "genres": str})
        _add_titled_items(log, items.rename(columns={"movieId": "item"}))
    return log


_LAYOUTS = {"u.data": _read_100k, "*.inter": _read_recbole, "ratings.dat": _read_1m, "ratings.csv": _read_20m}
_RATING_TYPES = {"user": np.int64, "item": np.int64, "rating": np.float32, "timestamp": np.int64}


def _require_columns(path: Path, found: Sequence[str], count: int) -> None:
    if len(found) != count:
        raise DataError(f"{path}: has {len(found)} columns, expected {count}")


def _headed(path: Path, types: dict[str, type]) -> pd.DataFrame:
    """A comma-separated file whose header names at least the columns of `types`."""
    header = [name.strip().strip('"') for name in first_line(path).split(",")]
    _require_names(path, header, types)
    return read_table(path, header, types, separator=",", header=True)


def _typed(path: Path, required: dict[str, type], optional: dict[str, type] | None = None) -> pd.DataFrame:
    """A RecBole file: tab-separated, header fields of the form name:type."""
    header = [name.split(":")[0] for name in first_line(path).split("\t")]
    _require_names(path, header, required)
    chosen = {name: kind for name, kind in (optional or {}).items() if name in header}
    return read_table(path, header, {**required, **chosen}, separator="\t", header=True)


def _require_names(path: Path, header: Sequence[str], required: dict[str, type]) -> None:
    missing = [name for name in required if name not in header]
    if missing:
        raise DataError(f"{path}: wrong columns: no {', '.join(missing)} among {', '.join(header)}")


def _ratings(path: Path, frame: pd.DataFrame, name: str, first_row: int = 1) -> RatingLog:
    ratings = frame["rating"].to_numpy(np.float32)
    check_range(path, "rating", ratings, *_RATINGS, first_row)
    times = frame["timestamp"].to_numpy(np.float64)
    check_range(path, "timestamp", times, 0, 1e11, first_row)
    users, user_tokens = pd.factorize(frame["user"])
    items, item_tokens = pd.factorize(frame["item"])
    return RatingLog(
        name=name,
        users=users.astype(np.int64),
        items=items.astype(np.int64),
        ratings=ratings,
        timestamps=times.astype(np.int64),
        user_tokens=[str(token) for token in user_tokens],
        item_tokens=[str(token) for token in item_tokens],
    )


def _add_users(log: RatingLog, frame: pd.DataFrame) -> None:
    """Aligns the user file with `log.user_tokens`; a user without a line stays unknown."""
    aligned = frame.drop_duplicates("user").set_index("user").reindex(log.user_tokens)
    if "age" in aligned:
        log.age = pd.to_numeric(aligned["age"], errors="coerce").to_numpy(np.float32)
    for name in ("gender", "occupation"):
        if name in aligned:
            log.user_fields[name] = aligned[name].fillna("").tolist()


def _add_items(
    log: RatingLog, tokens: pd.Series, years: pd.Series | None, genres: Sequence[tuple[str, ...]] | None
) -> None:
    """Aligns years and genres with `log.item_tokens`; an item without a line stays unknown."""
    place = {token: row for row, token in enumerate(tokens)}
    rows = [place.get(token) for token in log.item_tokens]
    if years is not None:
        numbers = pd.to_numeric(years, errors="coerce").to_numpy(np.float32)
        log.year = np.array([np.nan if row is None else numbers[row] for row in rows], np.float32)
    if genres is not None:
        log.genres = [() if row is None else genres[row] for row in rows]


def _add_titled_items(log: RatingLog, items: pd.DataFrame) -> None:
    """MovieLens 1M and later: the year stands in the title, genres are joined by |."""
    years = items["title"].str.extract(r"\((\d{4})\)\s*$", expand=False)
    unknown = ("", "(no genres listed)")
    genres = [() if text in unknown else tuple(text.split("|")) for text in items["genres"]]
    _add_items(log, items["item"], years, genres)
