"""How good scores are, and how far chance alone would move that: quality measures with their standard deviations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata
from sklearn.metrics import log_loss, roc_auc_score

_SURE = 2.0  # deviations: what is further away than so many is hardly noise (95 %)


@dataclass(frozen=True)
class Quality:
    """How well probabilities fit labels: area under the ROC curve, and log loss in nats."""

    auc: float
    log_loss: float


def quality_of(labels: np.ndarray, scores: np.ndarray) -> Quality:
    """Quality of probabilities [N] for labels [N], 0 or 1."""
    return Quality(float(roc_auc_score(labels, scores)), float(log_loss(labels, scores, labels=[0, 1])))


@dataclass(frozen=True)
class Estimate:
    """A number that was measured on a sample, and its standard deviation over samples of that size."""

    value: float
    deviation: float

    def surely_above(self, bound: float) -> bool:
        """Whether the number lies above a bound by more than chance explains."""
        return self.value - _SURE * self.deviation > bound

    def __neg__(self) -> Estimate:
        return Estimate(-self.value, self.deviation)

    @property
    def noise(self) -> bool:
        """Whether chance explains a difference from 0."""
        return abs(self.value) <= _SURE * self.deviation

    def __str__(self) -> str:
        """The number, with its sign, and its deviation to the digits that mean something: "-0.0003 ± 0.0008"."""
        digits = decimals(self.deviation)
        value, deviation = round(self.value, digits) + 0.0, f"{self.deviation:.{digits}f}"
        if not round(self.deviation, digits):
            least = f"{10**-digits:.{digits}f}"
            return f"{value:+.{digits}f} ± <{least}" if value else f"less than {least}"
        return f"{value:+.{digits}f} ± {deviation}"


def decimals(deviation: float) -> int:
    """How many decimals of a number mean something: up to the first digit of its deviation, from 2 to 5."""
    if not 0 < deviation < 1:
        return 5 if deviation == 0 else 2
    return min(max(-math.floor(math.log10(deviation)), 2), 5)


def auc_estimate(labels: np.ndarray, scores: np.ndarray) -> Estimate:
    """AUC of scores [N] for labels [N] with its deviation."""
    return _estimate(*_placements(labels, scores))


def auc_change(labels: np.ndarray, scores: np.ndarray, other: np.ndarray) -> Estimate:
    """AUC of `scores` minus that of `other`, for the same labels [N].

    The deviation is that of the difference: since both score the same rows, most of what moves one AUC from sample to
    sample moves the other alike. (DeLong et al., "Comparing the areas under two or more correlated receiver operating
    characteristic curves", 1988.) It takes rows as independent, and says nothing about another seed of the training.
    """
    pairs = zip(_placements(labels, scores), _placements(labels, other), strict=True)
    positives, negatives = (one - two for one, two in pairs)
    return _estimate(positives, negatives)


def log_loss_deviation(labels: np.ndarray, scores: np.ndarray) -> float:
    """Standard deviation of the mean log loss of probabilities [N]."""
    likelihood = np.where(labels > 0.5, scores, 1 - scores)
    return float(np.log(np.maximum(likelihood, 1e-15)).std() / math.sqrt(len(labels)))


def _placements(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(share of negatives below each positive, share of positives above each negative), equal ones counted by half."""
    positive = labels > 0.5
    ranks = rankdata(scores)
    above, below = scores[positive], scores[~positive]
    first = (ranks[positive] - rankdata(above)) / len(below)
    second = 1 - (ranks[~positive] - rankdata(below)) / len(above)
    return first, second


def _estimate(positives: np.ndarray, negatives: np.ndarray) -> Estimate:
    parts = [values.var(ddof=1) / len(values) if len(values) > 1 else math.inf for values in (positives, negatives)]
    return Estimate(float(positives.mean()), math.sqrt(sum(parts)))
