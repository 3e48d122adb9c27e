"""Whether a policy version may go live: a paired test that it is not worse than the live one. Pure.

Both inspect the same parts. The candidate passes only if the 95 % interval of (candidate − live), in balanced accuracy,
lies above −margin: a set that is too small to tell has a wide interval, and refuses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.evaluation.metrics import balanced_accuracy

_RESAMPLES = 10_000
_SEED = 0  # the same verdicts give the same decision
# Half an imagined part in each of the four cells (right or wrong, live or candidate) of each label, as in the interval
# of A. Agresti, Y. Min, "Simple improved confidence intervals for comparing matched proportions", Stat. Med. 24 (2005).
# Without them parts that all came out alike would make an interval of no width, however few they are, and a version
# that is worse by the margin would pass twice as often as the stated 2.5 % where the versions seldom differ.
_IMAGINED = 0.5


@dataclass(frozen=True)
class Comparison:
    """`live`, `candidate`: balanced accuracies; `low`, `high`: the 95 % interval of their difference."""

    parts: int
    live: float
    candidate: float
    low: float
    high: float
    margin: float
    gained: int  # parts that only the candidate got right
    lost: int  # parts that only the live version got right

    @property
    def difference(self) -> float:
        return self.candidate - self.live

    @property
    def not_worse(self) -> bool:
        return self.low > -self.margin

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test that the versions are right equally often, labels taken together."""
        differing = self.gained + self.lost
        tail = sum(math.comb(differing, k) for k in range(min(self.gained, self.lost) + 1))
        return min(1.0, 2 * tail / (1 << differing))


def compare(truth: Sequence[bool], live: Sequence[bool], candidate: Sequence[bool], margin: float) -> Comparison:
    """The verdicts (anomaly present) of two versions on the same parts, a place a part.

    ValueError: the lengths differ, or one label is missing.
    """
    accuracies = balanced_accuracy(truth, live), balanced_accuracy(truth, candidate)
    anomalous = np.array(truth, dtype=bool)
    change = (np.array(candidate) == anomalous).astype(int) - (np.array(live) == anomalous)
    low, high = _interval([change[anomalous], change[~anomalous]])
    gained, lost = int((change > 0).sum()), int((change < 0).sum())
    return Comparison(len(truth), *accuracies, low, high, margin, gained, lost)


def _interval(labels: Sequence[np.ndarray[tuple[int], np.dtype[np.int_]]]) -> tuple[float, float]:
    """Of the mean over labels of the mean change (1 gained, 0 alike, −1 lost): parts are drawn again within each label.

    Such a draw is a multinomial one, for a change has three values only.
    """
    random = np.random.default_rng(_SEED)
    means = np.zeros(_RESAMPLES)
    for change in labels:
        lost, gained = (change < 0).sum() + _IMAGINED, (change > 0).sum() + _IMAGINED
        shares = np.array([lost, len(change) + 4 * _IMAGINED - lost - gained, gained]) / (len(change) + 4 * _IMAGINED)
        drawn = random.multinomial(len(change), shares, _RESAMPLES)
        means += (drawn[:, 2] - drawn[:, 0]) / len(change) / len(labels)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)
