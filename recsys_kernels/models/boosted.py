"""Gradient-boosted trees on a data set's features: what a ranking model should at least match.

Trees read no ids, so that each id becomes a number: the mean label of the other training rows that have it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

from recsys_kernels.data.examples import UNKNOWN, Dataset

MAX_ROWS = 250_000  # training rows, the latest: more take minutes
FOLDS, PRIOR = 5, 5.0  # the prior of the encoding of ids counts as so many labels
ROUNDS, RATE, LEAVES = 250, 0.06, 15
_FEW = 64  # a bag of at most so many different tokens becomes one column a token
_CHUNK = 1_000_000


@dataclass(frozen=True)
class Boosted:
    """The result of the trees.

    Attributes:
        scores: probabilities of the test rows, float64 [test rows].
        rounds: trees that were kept, by validation AUC.
        rows: training rows that were read.
        columns: what the trees read, by name.
    """

    scores: np.ndarray
    rounds: int
    rows: int
    columns: list[str]


def fit_boosted(data: Dataset, seed: int = 0, threads: int = 1) -> Boosted:
    """Fits trees on the training rows and scores the test rows.

    (Ke et al., "LightGBM: A Highly Efficient Gradient Boosting Decision Tree", 2017, in scikit-learn's version.)

    Args:
        data: examples; the validation part chooses the number of trees.
        seed: of the folds and the trees.
        threads: at most so many.
    """
    rows = data.rows("train")[-MAX_ROWS:]
    validation, test = data.rows("validation")[-MAX_ROWS:], data.rows("test")
    columns = _columns(data)
    folds = np.random.default_rng(seed).integers(0, FOLDS, len(rows))
    encodings = [_Encoding(data, name, rows, folds) for name in columns["ids"]]
    model = HistGradientBoostingClassifier(
        learning_rate=RATE,
        max_iter=ROUNDS,
        max_leaf_nodes=LEAVES,
        min_samples_leaf=50,
        l2_regularization=1.0,
        max_features=0.5,
        early_stopping=False,
        random_state=seed,
    )
    with threadpool_limits(threads):
        model.fit(_matrix(data, rows, columns, [code.of_training() for code in encodings]), data.labels[rows])
        found = _matrix(data, validation, columns, [code.of(validation) for code in encodings])
        aucs = [roc_auc_score(data.labels[validation], part[:, 1]) for part in model.staged_predict_proba(found)]
        rounds = int(np.argmax(aucs)) + 1
        scores = []
        for start in range(0, len(test), _CHUNK):
            part = test[start : start + _CHUNK]
            found = _matrix(data, part, columns, [code.of(part) for code in encodings])
            stages = model.staged_predict_proba(found)
            scores.append(next(stage for number, stage in enumerate(stages, 1) if number == rounds)[:, 1])
    names = [feature.name for feature in data.schema.dense] + columns["ids"] + columns["bags"]
    return Boosted(np.concatenate(scores), rounds, len(rows), names)


def _columns(data: Dataset) -> dict[str, list[str]]:
    """Which categorical features trees can read: "ids" to encode, "bags" with few tokens.

    Left out are ids of which most validation rows have new ones, such as users, since trees could learn only that the
    encoding of known ones says much; and long bags, such as a user's history.
    """
    validation = data.rows("validation")[-MAX_ROWS:]
    ids, bags = [], []
    for name, table in data.schema.features:
        bag = data.bags[name]
        if bag.starts is None:
            known = (bag.values[validation] != UNKNOWN).mean()
            ids += [name] if known >= 0.5 else []
        elif len(data.schema.vocabularies[table]) <= _FEW:
            bags.append(name)
    return {"ids": ids, "bags": bags}


class _Encoding:
    """The mean label of each id of a feature (Micci-Barreca, 2001), of a training row from the other folds only."""

    def __init__(self, data: Dataset, name: str, rows: np.ndarray, folds: np.ndarray) -> None:
        self._ids, self._rows, self._folds = data.bags[name].values, rows, folds
        self._labels = data.labels
        self._count = int(self._ids.max()) + 1
        self._mean = float(data.labels[rows].mean())

    def of_training(self) -> np.ndarray:
        """float64 [training rows]."""
        out = np.empty(len(self._rows))
        for fold in range(FOLDS):
            inside = self._folds == fold
            out[inside] = self._means(self._rows[~inside])[self._ids[self._rows[inside]]]
        return out

    def of(self, rows: np.ndarray) -> np.ndarray:
        """float64 [rows], from all training rows."""
        return self._means(self._rows)[self._ids[rows]]

    def _means(self, rows: np.ndarray) -> np.ndarray:
        ids = self._ids[rows]
        totals = np.bincount(ids, self._labels[rows], minlength=self._count)
        counts = np.bincount(ids, minlength=self._count)
        totals[UNKNOWN] = counts[UNKNOWN] = 0
        return (totals + PRIOR * self._mean) / (counts + PRIOR)


def _matrix(data: Dataset, rows: np.ndarray, columns: dict[str, list[str]], encoded: list[np.ndarray]) -> np.ndarray:
    """float32 [rows, columns]."""
    tables = dict(data.schema.features)
    parts = [data.dense[rows], *(code[:, None] for code in encoded)]
    for name in columns["bags"]:
        values, lengths = data.bags[name].take(rows)
        flags = np.zeros((len(rows), len(data.schema.vocabularies[tables[name]])))
        flags[np.repeat(np.arange(len(rows)), lengths), values] = 1
        parts.append(flags)
    return np.concatenate(parts, axis=1, dtype=np.float32)
