"""What is measured of verdicts. Pure."""

from __future__ import annotations

from collections.abc import Sequence


def balanced_accuracy(truth: Sequence[bool], predicted: Sequence[bool]) -> float:
    """(share of anomalous parts rejected + share of normal parts passed) / 2; in [0, 1]; chance is 0.5.

    Plain accuracy would reward guessing the commoner label. ValueError unless both labels occur.
    """
    found = [p for t, p in zip(truth, predicted, strict=True) if t]
    passed = [not p for t, p in zip(truth, predicted, strict=True) if not t]
    if not found or not passed:
        raise ValueError("balanced accuracy needs normal and anomalous parts")
    return (sum(found) / len(found) + sum(passed) / len(passed)) / 2
