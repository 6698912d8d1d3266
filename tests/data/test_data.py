"""Readers, feature building and fetching, on small generated data sets in every layout."""

from __future__ import annotations

import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from small_data import ITEMS, RATINGS, USERS, WRITERS, World, criteo_lines, log_of, write_criteo

from recsys_kernels.data import DataError, Schema, features, fetch
from recsys_kernels.data.checksum import sha256
from recsys_kernels.data.criteo import CATEGORIES, COLUMNS, MIN_COUNT, read_criteo
from recsys_kernels.data.examples import Bags, DenseFeature
from recsys_kernels.data.features import HIDDEN, HISTORY, PRIOR, RECENT_PRIOR, rating_dataset, split_by_time
from recsys_kernels.data.history import past_counts, previous
from recsys_kernels.data.load import load_dataset
from recsys_kernels.data.movielens import LIKED, read_movielens


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_log(layout: str, tmp_path: Path) -> None:
    world = World()
    log = read_movielens(WRITERS[layout](world, tmp_path))
    assert [int(log.user_tokens[u]) for u in log.users] == world.users.tolist()
    assert [int(log.item_tokens[i]) for i in log.items] == world.items.tolist()
    assert log.ratings.tolist() == world.ratings.tolist()
    assert log.timestamps.tolist() == world.times.tolist()
    assert log.year is not None
    assert log.genres is not None
    for token, year, genres in zip(log.item_tokens, log.year, log.genres, strict=True):
        assert year == world.years[int(token) - 1]
        assert genres == world.genres[int(token) - 1]
    if layout == "20m":
        assert log.age is None
        assert not log.user_fields
    else:
        assert log.age is not None
        for number, token in enumerate(log.user_tokens):
            assert log.age[number] == world.ages[int(token) - 1]
            assert log.user_fields["gender"][number] == world.genders[int(token) - 1]
            assert log.user_fields["occupation"][number] == world.jobs[int(token) - 1]


@pytest.mark.parametrize("layout", WRITERS)
def test_a_file_of_the_layout_is_as_good_as_its_folder(layout: str, tmp_path: Path) -> None:
    WRITERS[layout](World(), tmp_path)
    name = {"100k": "u.data", "recbole": "w.inter", "1m": "ratings.dat", "20m": "ratings.csv"}[layout]
    by_file, by_folder = load_dataset(tmp_path / name), load_dataset(tmp_path)
    np.testing.assert_array_equal(by_file.dense, by_folder.dense)
    assert len(by_file) == RATINGS


@pytest.mark.parametrize("layout", WRITERS)
def test_files_about_users_and_items_may_be_missing(layout: str, tmp_path: Path) -> None:
    world = World()
    whole = read_movielens(WRITERS[layout](world, tmp_path))
    for path in tmp_path.iterdir():
        if path.name not in ("u.data", "w.inter", "ratings.dat", "ratings.csv"):
            path.unlink()
    log = read_movielens(tmp_path)
    assert log.users.tolist() == whole.users.tolist()
    assert (log.age, log.user_fields, log.year, log.genres) == (None, {}, None, None)
    assert len(load_dataset(tmp_path)) == RATINGS


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    path = World().write_20m(tmp_path) / "ratings.csv"
    expected = load_dataset(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    np.testing.assert_array_equal(load_dataset(tmp_path).dense, expected.dense)


def test_an_empty_last_field_of_criteo_is_no_short_line(tmp_path: Path) -> None:
    lines = criteo_lines()
    lines[5][-1] = ""
    assert load_dataset(write_criteo(tmp_path / "day", lines)).bags["C26"].values[5] == 0


def test_running_sums_see_only_earlier_times() -> None:
    world = World(1)
    counts, sums = past_counts(world.users, world.times, world.ratings)
    for row in range(RATINGS):
        past = (world.users == world.users[row]) & (world.times < world.times[row])
        assert counts[row] == past.sum()
        assert sums[row] == world.ratings[past].sum()


@pytest.mark.parametrize("longest", [1, 3, 1000])
def test_history_is_the_latest_of_the_past(longest: int) -> None:
    world = World(2)
    chosen = world.ratings >= 4
    windows = Bags(*previous(world.users, world.times, world.items, chosen, longest))
    values, lengths = windows.take(np.arange(RATINGS))
    parts = np.split(values, np.cumsum(lengths)[:-1])
    for row, part in enumerate(parts):
        past = (world.users == world.users[row]) & (world.times < world.times[row]) & chosen
        rows = np.flatnonzero(past)
        expected = world.items[rows[np.argsort(world.times[rows], kind="stable")]][-longest:]
        assert part.tolist() == expected.tolist()


def test_no_feature_changes_when_the_future_does() -> None:
    world = World(3)
    before = rating_dataset(log_of(world))
    order = np.argsort(world.times, kind="stable")
    first = before.bounds[0]
    future = order[first:]
    world.ratings[future] = 6 - world.ratings[future]
    world.items[future] = world.items[future] % ITEMS + 1
    after = rating_dataset(log_of(world))
    assert after.bounds == before.bounds
    train = before.rows("train")
    np.testing.assert_array_equal(before.dense[train], after.dense[train])
    for left, right in zip(before.batch(train), after.batch(train), strict=True):
        assert left.equal(right)
    # And the check can fail: later rows do depend on what was changed.
    later = before.rows("test")
    assert not np.array_equal(before.dense[later], after.dense[later])


def test_dense_features_against_a_loop() -> None:
    world = World(4)
    data = rating_dataset(log_of(world))
    order = np.argsort(world.times, kind="stable")
    names = [feature.name for feature in data.schema.dense]
    overall = world.ratings[order][: data.bounds[0]].mean()
    beyond = np.empty(RATINGS)  # what a rating says beyond the item's past mean
    for row in range(RATINGS):
        past = (world.items == world.items[row]) & (world.times < world.times[row])
        level = (world.ratings[past] - overall).sum() / (past.sum() + PRIOR)
        beyond[row] = world.ratings[row] - overall - level
    decades = np.array(world.years)[world.items - 1] // 10
    for row in (0, 150, RATINGS - 1):
        one = order[row]
        past = (world.users == world.users[one]) & (world.times < world.times[one])
        mean = overall + (world.ratings[past] - overall).sum() / (past.sum() + PRIOR)
        latest = np.flatnonzero(past)[np.argsort(world.times[past], kind="stable")][-5:]
        alike = past & (decades == decades[one])
        for name, raw in (
            ("user_mean", mean),
            ("user_bias_last_5", beyond[latest].sum() / (len(latest) + RECENT_PRIOR)),
            ("decade_bias", beyond[alike].sum() / (alike.sum() + PRIOR)),
            ("user_count", past.sum()),
            ("user_age", world.ages[world.users[one] - 1]),
        ):
            column = names.index(name)
            expected = data.schema.dense[column].scale(np.array([raw], np.float64))[0]
            assert data.dense[row, column] == pytest.approx(expected, abs=1e-5)
    train = data.dense[data.rows("train")]
    np.testing.assert_allclose(train.mean(axis=0), 0, atol=1e-5)


def test_dense_features_stay_in_the_range_of_training() -> None:
    world = World(4)
    order = np.argsort(world.times, kind="stable")
    world.times[order[-60:]] += 4000 * 86400  # days since the first rating that training never saw
    data = rating_dataset(log_of(world))
    column = [feature.name for feature in data.schema.dense].index("user_days")
    train, later = data.dense[data.rows("train")], data.dense[data.rows("test")]
    assert (later.max(axis=0) <= train.max(axis=0)).all()
    assert (later.min(axis=0) >= train.min(axis=0)).all()
    feature = data.schema.dense[column]
    assert feature.high is not None
    assert np.expm1(feature.high) < 100
    assert feature.scale(np.array([1e3, 1e300]))[0] == feature.scale(np.array([1e300]))[0] == later[:, column].max()
    # The range is kept in the files, and without one (older files) nothing is cut.
    again = Schema.from_json(data.schema.to_json(), {t: v.tokens for t, v in data.schema.vocabularies.items()})
    assert again.dense == data.schema.dense
    assert DenseFeature("x", mean=1.0, std=2.0).scale(np.array([101.0])).item() == 50.0


def test_a_constant_dense_feature_is_zero_and_huge_numbers_stay_finite() -> None:
    constant = DenseFeature("x").fit(np.full(77, 0.1))
    assert constant.std == 1.0
    np.testing.assert_allclose(constant.scale(np.array([0.1, 5.0])), 0.0, atol=1e-12)
    assert np.isfinite(DenseFeature("x", std=1e-300).scale(np.array([1e300, -1e300, np.inf, np.nan]))).all()
    assert DenseFeature("x").fit(np.array([np.nan])) == DenseFeature("x")


def test_blocks_of_users_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rating_dataset(log_of(World(4)))
    monkeypatch.setattr(features, "_BLOCK_ROWS", 7)
    np.testing.assert_array_equal(rating_dataset(log_of(World(4))).dense, whole.dense)


@pytest.mark.parametrize("shares", [(0.8, 0.1), (0.5, 0.25)])
def test_split_keeps_time_order_and_equal_times_together(shares: tuple[float, float]) -> None:
    times = np.sort(World(5).times)
    first, second = split_by_time("world", times, shares)
    assert times[first - 1] < times[first]
    assert times[second - 1] < times[second]
    assert abs(first / RATINGS - shares[0]) < 0.05
    assert abs(second / RATINGS - sum(shares)) < 0.05


def test_vocabularies_come_from_training_rows() -> None:
    world = World(6)
    late = np.argsort(world.times, kind="stable")[-20:]
    early = np.setdiff1d(np.arange(RATINGS), late)
    world.users[early] = world.users[early] % (USERS - 1) + 1
    world.users[late] = USERS  # a user, and so an age, a job and tokens that training never sees
    data = rating_dataset(log_of(world))
    vocabulary = data.schema.vocabularies["user"]
    assert str(USERS) not in vocabulary.tokens
    assert vocabulary.row(USERS) == 0
    assert len(vocabulary) == USERS
    assert set(data.bags["user"].values[-20:]) == {0}
    assert set(data.bags["user"].values[: data.bounds[0]]) == set(range(1, USERS))


def test_batch_is_feature_major() -> None:
    data = rating_dataset(log_of(World(7)))
    rows = np.array([5, 399, 200, 5])
    batch = data.batch(rows)
    assert batch.dense.shape == (4, len(data.schema.dense))
    assert batch.labels.tolist() == data.labels[rows].tolist()
    assert list(data.bags) == [name for name, _ in data.schema.features]
    bags = np.split(batch.indices.numpy(), batch.offsets.numpy()[1:-1])
    assert len(bags) == len(data.bags) * 4
    for number, name in enumerate(data.bags):
        for place, row in enumerate(rows):
            expected, _ = data.bags[name].take(np.array([row]))
            assert bags[number * 4 + place].tolist() == expected.tolist()
    assert max(len(bag) for bag in bags) <= HISTORY


def test_dropping_hides_only_the_named_ids() -> None:
    data = rating_dataset(log_of(World(8)))
    rows = data.rows("train")
    assert data.dropped == HIDDEN
    data.dropped = dict.fromkeys(HIDDEN, 1.0)
    full, dropped = data.batch(rows), data.batch(rows, 1.0, np.random.default_rng(0))
    kept = [name for name in data.bags if name not in data.dropped]
    for number, name in enumerate(data.bags):
        start, end = full.offsets[number * len(rows)], full.offsets[(number + 1) * len(rows)]
        part = dropped.indices[start:end]
        assert part.equal(full.indices[start:end]) if name in kept else not part.any()
    data.dropped = {"genres": 0.6}
    half = data.batch(rows, 0.5, np.random.default_rng(0))
    names = list(data.bags)
    begin, end = (full.offsets[(names.index("genres") + more) * len(rows)] for more in (0, 1))
    hidden = (half.indices == 0) & (full.indices != 0)
    assert hidden[begin:end].float().mean() == pytest.approx(0.3, abs=0.05)
    assert int(hidden.sum()) == int(hidden[begin:end].sum())


def test_limit_keeps_the_latest_ratings() -> None:
    world = World(9)
    data = rating_dataset(log_of(world), limit=100)
    latest = world.ratings[np.argsort(world.times, kind="stable")][-100:]
    assert data.labels.tolist() == (latest >= LIKED).tolist()


def test_a_server_encodes_as_training_did() -> None:
    world = World(10)
    data = rating_dataset(log_of(world))
    row = int(data.rows("test")[0])
    example: dict[str, object] = {}
    for column, feature in enumerate(data.schema.dense):
        value = float(data.dense[row, column]) * feature.std + feature.mean
        example[feature.name] = np.expm1(value) if feature.log else value
    for name, table in data.schema.features:
        values, _ = data.bags[name].take(np.array([row]))
        tokens = [data.schema.vocabularies[table].tokens[v - 1] if v else "never seen" for v in values]
        example[name] = tokens if data.bags[name].starts is not None else tokens[0]
    served, trained = data.schema.encode([example]), data.batch(np.array([row]))
    np.testing.assert_allclose(served.dense, trained.dense, atol=1e-4)
    assert served.indices.equal(trained.indices)
    assert served.offsets.equal(trained.offsets)
    with pytest.raises(KeyError, match="unknown feature 'colour'"):
        data.schema.encode([{"colour": "red"}])


@pytest.mark.parametrize("name", ["day_0.tsv", "day_0.tsv.gz"])
def test_criteo(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recsys_kernels.data.tables.CHUNK_ROWS", 64)
    lines = criteo_lines()
    data = load_dataset(write_criteo(tmp_path / name, lines))
    assert data.bounds == (240, 270)
    assert data.labels.tolist() == [float(line[0]) for line in lines]
    assert list(data.bags) == CATEGORIES
    for column, feature in enumerate(CATEGORIES, 14):
        tokens = data.schema.vocabularies[feature].tokens
        counts = {token: sum(line[column] == token for line in lines[:240]) for token in tokens}
        assert min(counts.values()) >= MIN_COUNT
        for row, line in enumerate(lines):
            expected = tokens.index(line[column]) + 1 if line[column] in tokens else 0
            assert data.bags[feature].values[row] == expected
    assert "deadbeef" not in data.schema.vocabularies["C1"].tokens
    assert "" not in data.schema.vocabularies["C1"].tokens
    raw = np.array([np.log1p(max(float(line[1]), 0)) for line in lines[:240] if line[1]])
    raw = raw.clip(*np.quantile(raw, (0.005, 0.995)))
    assert data.schema.dense[0].mean == pytest.approx(np.mean(raw), rel=1e-5)
    missing = next(row for row, line in enumerate(lines) if line[1] == "")
    assert data.dense[missing, 0] == 0


def test_criteo_limit_reads_the_first_lines(tmp_path: Path) -> None:
    lines = criteo_lines()
    data = read_criteo(write_criteo(tmp_path / "day", lines), limit=100)
    assert data.labels.tolist() == [float(line[0]) for line in lines[:100]]


def _broken(name: str, text: str | bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        World().write_100k(folder)
        path = folder / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return folder

    return write


def _criteo(change: Callable[[list[list[str]]], object]) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        lines = criteo_lines(40)
        change(lines)
        return write_criteo(folder / "day", lines)

    return write


def _csv(header: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / "ratings.csv").write_text(header)
        return folder

    return write


def _parquet(folder: Path) -> Path:
    (folder / "part-0.parquet").write_bytes(b"PAR1\x15\x04\x00PAR1")
    return folder


def _criteo_folder(folder: Path) -> Path:
    (folder / ".hidden").write_bytes(b"")
    (folder / "readme.bin").write_bytes(b"\xff\xfe\x00")
    write_criteo(folder / "train.txt", criteo_lines(40))
    return folder


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such path": (lambda folder: folder / "nowhere", "no such file or folder"),
    "unknown folder": (lambda folder: folder, r"looked for u\.data .* ratings\.csv"),
    "archive": (_broken("ml.zip", "PK"), ""),
    "empty ratings": (_broken("u.data", ""), r"u\.data: is empty"),
    "few columns": (_broken("u.data", "1\t2\t3\n"), r"u\.data: wrong columns: 3 of them, expected 4"),
    "long line": (_broken("u.data", "1\t2\t3\t4\n1\t2\t3\t4\t5\n"), r"u\.data: wrong content"),
    "text for a number": (_broken("u.data", "1\t2\tgood\t4\n"), r"u\.data: wrong content .*good"),
    "rating too high": (_broken("u.data", "1\t2\t3\t4\n1\t2\t9\t4\n"), r"line 2: rating 9 is outside 0\.5 to 5"),
    "after a blank line": (_broken("u.data", "1\t2\t3\t4\n\n \n1\t2\t9\t4\n"), "line 4: rating 9 is outside"),
    "no rating": (_broken("u.data", "1\t2\t\t4\n"), "rating nan is outside"),
    "negative time": (_broken("u.data", "1\t2\t3\t-4\n"), "timestamp -4 is outside"),
    "binary": (_broken("u.data", b"\xff\xfe\x00\x01"), r"u\.data: is not a text file"),
    "one time": (_broken("u.data", "1\t2\t3\t4\n" * 30), "30 rows with 1 different times cannot be split"),
    "one label": (_broken("u.data", "".join(f"1\t2\t3\t{t}\n" for t in range(50))), "has only labels 0"),
    "csv header": (_csv("user,movie,rating\n1,2,3\n"), r"wrong columns: no userId, movieId, timestamp"),
    "csv without rows": (_csv("userId,movieId,rating,timestamp\n"), "has a header but no rows"),
    "criteo label": (_criteo(lambda lines: lines[7].__setitem__(0, "2")), "line 8: label 2 is outside 0 to 1"),
    "criteo half label": (_criteo(lambda lines: lines[7].__setitem__(0, "0.5")), r"line 8: label 0\.5 is not 0 or 1"),
    "criteo blank line": (
        _criteo(lambda lines: [lines.insert(3, []), lines[8].__setitem__(0, "2")]),
        "line 9: label 2 is outside 0 to 1",
    ),
    "criteo short line": (
        _criteo(lambda lines: [lines.insert(3, []), lines[8].pop()]),
        "line 9: has fewer than 40 columns",
    ),
    "criteo columns": (_criteo(lambda lines: [line.pop() for line in lines]), "nor a Criteo TSV of 40 columns"),
    "criteo text": (_criteo(lambda lines: lines[0].__setitem__(3, "abc")), "wrong content .*abc"),
    "criteo short": (_criteo(lambda lines: lines.__delitem__(slice(2, None))), "2 lines cannot be split"),
    "parquet": (
        lambda folder: _parquet(folder) / "part-0.parquet",
        r"is a Parquet file, .* write it as text first: pand",
    ),
    "parquet folder": (_parquet, r"holds Parquet files \(part-0.parquet\), .* write it as text first: pandas"),
    "criteo folder": (_criteo_folder, r"is a folder with a Criteo log; name the file itself: --data .*/train\.txt$"),
    "criteo gz": (lambda folder: _write(folder / "day.gz", b"not gzip"), "cannot be read"),
}


def _write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_clear_line(case: str, tmp_path: Path) -> None:
    build, message = BAD[case]
    path = build(tmp_path)
    if case == "archive":
        path, message = path / "ml.zip", "is an archive; unpack it first"
    with pytest.raises(DataError, match=message) as caught:
        load_dataset(path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def fake_wheel(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Stands in for pip: a wheel with three small files, whose SHA-256 are the expected ones."""
    content = {name: f"content of {name}".encode() for name in fetch.SHA256}
    monkeypatch.setattr(fetch, "installed_recbole", lambda: None)

    def download(target: Path) -> Path:
        path = target / "recbole.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(zipfile.ZipInfo(f"{fetch.FOLDER}/{name}"), data)
        return path

    monkeypatch.setattr(fetch, "_pip_download", download)
    return download


def test_fetch_keeps_checked_files_and_reuses_them(
    fake_wheel: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"recbole\.whl differs from its SHA-256"):
        fetch.movielens_100k(tmp_path / "cache")
    monkeypatch.setattr(fetch, "WHEEL_SHA256", sha256(fake_wheel(tmp_path)))
    with pytest.raises(DataError, match=r"ml-100k\.inter differs from its SHA-256"):
        fetch.movielens_100k(tmp_path / "cache")
    for name in fetch.SHA256:
        monkeypatch.setitem(fetch.SHA256, name, sha256(tmp_path / "cache" / "ml-100k" / name))
    (tmp_path / "cache" / "ml-100k" / "ml-100k.user").write_text("damaged")
    folder = fetch.movielens_100k(tmp_path / "cache")  # fetched again, since a file was damaged
    assert (folder / "ml-100k.user").read_text() == "content of ml-100k.user"
    monkeypatch.setattr(fetch, "_pip_download", lambda target: pytest.fail("fetched a second time"))
    assert fetch.movielens_100k(tmp_path / "cache") == folder
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["ml-100k"]


def test_fetch_tells_why_pip_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "installed_recbole", lambda: None)
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(fetch.subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(DataError, match=r"No matching distribution found\); install it yourself .* --data PATH"):
        fetch.movielens_100k(tmp_path)


def test_columns_are_criteos() -> None:
    assert len(COLUMNS) == 1 + 13 + 26
