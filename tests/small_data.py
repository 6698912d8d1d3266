"""Small generated data sets in every layout that the readers know."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import numpy as np

from recsys_kernels.data import Dataset
from recsys_kernels.data.features import rating_dataset
from recsys_kernels.data.movielens import RatingLog

USERS, ITEMS, RATINGS = 14, 17, 400
GENDERS, JOBS = ("F", "M"), ("artist", "writer", "other")
GENRES_100K = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
GENRES = ("Action", "Comedy", "Drama", "Western")


class World:
    """A small set of ratings, users and films, written in any of the published layouts."""

    def __init__(self, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        pairs = random.choice(USERS * ITEMS, 200, replace=False)
        pairs = np.concatenate((pairs, random.choice(USERS * ITEMS, RATINGS - 200)))
        self.users = pairs // ITEMS + 1
        self.items = pairs % ITEMS + 1
        self.ratings = random.integers(1, 6, RATINGS)
        # Many equal timestamps: that is where a history leaks.
        self.times = 875_000_000 + random.integers(0, 120, RATINGS) * 5000
        self.ages = [18 + 3 * user for user in range(USERS)]
        self.genders = [GENDERS[user % 2] for user in range(USERS)]
        self.jobs = [JOBS[user % 3] for user in range(USERS)]
        self.years = [1980 + item for item in range(ITEMS)]
        self.genres = [tuple(GENRES[g] for g in range(4) if (item + 1) >> g & 1) for item in range(ITEMS)]

    def rows(self) -> list[tuple[int, int, int, int]]:
        return list(zip(self.users, self.items, self.ratings, self.times, strict=True))

    def write_100k(self, folder: Path) -> Path:
        (folder / "u.data").write_text("".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in self.rows()))
        users = zip(self.ages, self.genders, self.jobs, strict=True)
        lines = [f"{n}|{age}|{gender}|{job}|12345\n" for n, (age, gender, job) in enumerate(users, 1)]
        (folder / "u.user").write_text("".join(lines))
        names = ["unknown", *GENRES_100K]
        lines = []
        for number, (year, genres) in enumerate(zip(self.years, self.genres, strict=True), 1):
            flags = "|".join("1" if name in genres else "0" for name in names)
            lines.append(f"{number}|Café {number} ({year})|01-Jan-{year}||http://film/{number}|{flags}\n")
        (folder / "u.item").write_bytes("".join(lines).encode("latin-1"))
        return folder

    def write_recbole(self, folder: Path) -> Path:
        head = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
        (folder / "w.inter").write_text(head + "".join(f"{u}\t{i}\t{r}\t{t}\n" for u, i, r, t in self.rows()))
        users = zip(self.ages, self.genders, self.jobs, strict=True)
        lines = [f"{n}\t{age}\t{gender}\t{job}\t1\n" for n, (age, gender, job) in enumerate(users, 1)]
        head = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        (folder / "w.user").write_text(head + "".join(lines))
        items = zip(self.years, self.genres, strict=True)
        lines = [f"{n}\tFilm\t{year}\t{' '.join(genres)}\n" for n, (year, genres) in enumerate(items, 1)]
        head = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
        (folder / "w.item").write_text(head + "".join(lines))
        return folder

    def write_1m(self, folder: Path) -> Path:
        (folder / "ratings.dat").write_text("".join(f"{u}::{i}::{r}::{t}\n" for u, i, r, t in self.rows()))
        codes = {"artist": 2, "writer": 20, "other": 0}
        users = zip(self.ages, self.genders, self.jobs, strict=True)
        lines = [f"{n}::{gender}::{age}::{codes[job]}::1\n" for n, (age, gender, job) in enumerate(users, 1)]
        (folder / "users.dat").write_text("".join(lines))
        items = zip(self.years, self.genres, strict=True)
        lines = [f"{n}::Part: Café ({year})::{'|'.join(genres)}\n" for n, (year, genres) in enumerate(items, 1)]
        (folder / "movies.dat").write_bytes("".join(lines).encode("latin-1"))
        return folder

    def write_20m(self, folder: Path) -> Path:
        head = "userId,movieId,rating,timestamp\n"
        (folder / "ratings.csv").write_text(head + "".join(f"{u},{i},{r}.0,{t}\n" for u, i, r, t in self.rows()))
        items = zip(self.years, self.genres, strict=True)
        lines = [f'{n},"Film, The ({year})",{"|".join(genres)}\n' for n, (year, genres) in enumerate(items, 1)]
        (folder / "movies.csv").write_text("movieId,title,genres\n" + "".join(lines))
        return folder


WRITERS: dict[str, Callable[[World, Path], Path]] = {
    "100k": World.write_100k,
    "recbole": World.write_recbole,
    "1m": World.write_1m,
    "20m": World.write_20m,
}


def log_of(world: World) -> RatingLog:
    """The log without files, tokens in order of their number."""
    return RatingLog(
        "world",
        world.users - 1,
        world.items - 1,
        world.ratings.astype(np.float32),
        world.times,
        [str(n) for n in range(1, USERS + 1)],
        [str(n) for n in range(1, ITEMS + 1)],
        np.array(world.ages, np.float32),
        {"gender": world.genders, "occupation": world.jobs},
        np.array(world.years, np.float32),
        world.genres,
    )


def criteo_lines(count: int = 300) -> list[list[str]]:
    random = np.random.default_rng(0)
    lines = []
    for _ in range(count):
        integers = ["" if random.random() < 0.2 else str(random.integers(-1, 90)) for _ in range(13)]
        hashes = ["" if random.random() < 0.1 else f"{random.integers(0, 12):08x}" for _ in range(26)]
        lines.append([str(random.integers(0, 2)), *integers, *hashes])
    lines[3][14] = "deadbeef"  # once: too rare for the vocabulary
    return lines


def write_criteo(path: Path, lines: list[list[str]]) -> Path:
    text = "".join("\t".join(line) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def tiny_dataset(seed: int = 0) -> Dataset:
    """Examples without files."""
    return rating_dataset(log_of(World(seed)))
