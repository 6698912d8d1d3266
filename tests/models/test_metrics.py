"""AUC changes with their deviations, and the gradient-boosted trees beside the model."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from small_data import criteo_lines, tiny_dataset, write_criteo

from recsys_kernels.data.load import load_dataset
from recsys_kernels.models import boosted
from recsys_kernels.models.boosted import FOLDS, PRIOR, fit_boosted
from recsys_kernels.models.metrics import (
    Estimate,
    auc_change,
    auc_estimate,
    decimals,
    log_loss_deviation,
    quality_of,
)


def _sample(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels and the scores of two models that are alike; many scores are equal."""
    random = np.random.default_rng(seed)
    labels = (random.random(rows) < 0.4).astype(np.float32)
    common = labels + random.normal(size=rows)
    scores = [np.round(1 / (1 + np.exp(-common - 0.4 * random.normal(size=rows))), 2) for _ in range(2)]
    return labels, scores[0], scores[1]


def test_auc_is_that_of_scikit_learn() -> None:
    labels, one, two = _sample(500, 0)
    assert auc_estimate(labels, one).value == pytest.approx(roc_auc_score(labels, one))
    expected = roc_auc_score(labels, one) - roc_auc_score(labels, two)
    assert auc_change(labels, one, two).value == pytest.approx(expected)
    assert auc_change(labels, one, one) == Estimate(0.0, 0.0)
    quality = quality_of(labels, one)
    assert (quality.auc, quality.log_loss) == (roc_auc_score(labels, one), log_loss(labels, one))


def test_deviations_are_those_of_new_samples() -> None:
    found = []
    for seed in range(300):
        labels, one, two = _sample(400, seed)
        found.append((roc_auc_score(labels, one), roc_auc_score(labels, one) - roc_auc_score(labels, two)))
    labels, one, two = _sample(400, 1000)
    deviations = np.std(found, axis=0)
    assert auc_estimate(labels, one).deviation == pytest.approx(deviations[0], rel=0.25)
    assert auc_change(labels, one, two).deviation == pytest.approx(deviations[1], rel=0.25)
    # The same rows are scored by both: the difference moves far less than either.
    assert auc_change(labels, one, two).deviation < 0.6 * auc_estimate(labels, one).deviation
    losses = [log_loss(labels[rows], one[rows]) for rows in np.random.default_rng(0).integers(0, 400, (300, 400))]
    assert log_loss_deviation(labels, one) == pytest.approx(np.std(losses), rel=0.2)


@pytest.mark.parametrize(
    ("value", "deviation", "text"),
    [
        (-0.00031234, 0.00081, "-0.0003 ± 0.0008"),
        (0.012345, 0.0123, "+0.01 ± 0.01"),
        (-0.0000001, 0.0001, "+0.0000 ± 0.0001"),
        (0.00001, 0.0000001, "+0.00001 ± <0.00001"),
        (0.0, 0.0, "less than 0.00001"),
        (0.3, 2.0, "+0.30 ± 2.00"),
    ],
)
def test_figures_have_the_digits_that_mean_something(value: float, deviation: float, text: str) -> None:
    assert str(Estimate(value, deviation)) == text


def test_what_is_noise_and_what_is_sure() -> None:
    assert Estimate(0.0009, 0.0005).noise
    assert not Estimate(-0.0011, 0.0005).noise
    assert Estimate(-0.0003, 0.0003).surely_above(-0.001)
    assert not Estimate(-0.0003, 0.0004).surely_above(-0.001)
    assert -Estimate(0.1, 0.2) == Estimate(-0.1, 0.2)
    assert [decimals(value) for value in (0.5, 0.0047, 0.0001, 1e-9, 0.0)] == [2, 3, 4, 5, 5]


def test_one_example_of_a_class_has_no_deviation() -> None:
    assert auc_estimate(np.array([0, 1, 0]), np.array([0.1, 0.9, 0.3])).deviation == np.inf


def test_trees_learn_an_item_from_its_encoding() -> None:
    data = tiny_dataset(1)
    data.labels = (data.bags["item"].values % 2).astype(np.float32)
    data.dense = np.zeros_like(data.dense)
    data.bags["genres"].values[:] = 0
    found = fit_boosted(data, seed=3)
    labels = data.labels[data.rows("test")]
    assert roc_auc_score(labels, found.scores) > 0.95
    assert found.rows == data.bounds[0]
    assert 1 <= found.rounds <= boosted.ROUNDS
    assert fit_boosted(data, seed=3).scores.tolist() == found.scores.tolist()


def test_an_encoding_never_sees_the_rows_own_label() -> None:
    data = tiny_dataset(2)
    rows = data.rows("train")
    folds = np.random.default_rng(0).integers(0, FOLDS, len(rows))
    codes = boosted._Encoding(data, "item", rows, folds).of_training()
    items, labels = data.bags["item"].values[rows], data.labels[rows]
    for row in (0, 17, 200):
        others = (items == items[row]) & (folds != folds[row])
        expected = (labels[others].sum() + PRIOR * labels.mean()) / (others.sum() + PRIOR)
        assert codes[row] == pytest.approx(expected, rel=1e-6)
    later = data.rows("test")
    unknown = later[data.bags["item"].values[later] == 0]
    data.bags["item"].values[later[0]] = 0
    assert boosted._Encoding(data, "item", rows, folds).of(later[:1]) == pytest.approx(labels.mean())
    assert len(unknown) < len(later)


def test_trees_leave_out_what_they_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiny_dataset(3)
    monkeypatch.setattr(boosted, "ROUNDS", 3)
    assert {"user", "item", "genres", "liked_items"} <= {*fit_boosted(data).columns}
    monkeypatch.setattr(boosted, "_FEW", len(data.schema.vocabularies["genres"]))  # fewer than there are items
    assert "genres" in fit_boosted(data).columns
    assert not {"liked_items", "disliked_items"} & {*fit_boosted(data).columns}
    data.bags["user"].values[data.rows("validation")] = 0  # as where every user is new
    assert "user" not in fit_boosted(data).columns
    monkeypatch.setattr(boosted, "MAX_ROWS", 50)
    monkeypatch.setattr(boosted, "_CHUNK", 7)
    found = fit_boosted(data)
    assert found.rows == 50
    assert found.scores.shape == data.rows("test").shape


def test_trees_read_criteo(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boosted, "ROUNDS", 3)
    data = load_dataset(write_criteo(tmp_path / "day", criteo_lines()))  # type: ignore[operator]
    found = fit_boosted(data)
    assert {"I1", "C1", "C26"} <= {*found.columns}
    assert np.isfinite(found.scores).all()
