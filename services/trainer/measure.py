"""Is a policy better than the one it began as? Both play the same held-out parts, greedily and sampled, and are
compared part by part.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from services.data import procedural
from services.evaluation import gate
from services.reward.scoring import score
from services.trainer import heldout
from services.trainer.progress import progress_bar

_RESAMPLES = 10_000
_SEED = 0  # the same episodes give the same intervals
VARIANTS = 50
# Parts that no training has seen, SFT's or RL's, and that SFT's own measurement does not use either.
FIRST_SEED = 3 * procedural.TRAINING_VARIANTS


@dataclass(frozen=True)
class Change:
    """Of a mean over parts, from `before` to `after`; `low`, `high`: the 95 % interval of the difference."""

    before: float
    after: float
    low: float
    high: float


@dataclass(frozen=True)
class Played:
    """One policy's episodes, one way."""

    outcomes: list[heldout.Outcome]
    rewards: list[float]


def report(
    before: Path, after: Path, reward: str, per_category: int, out: Path, console: Console
) -> dict[str, dict[str, Change]]:
    """Plays both on `per_category` held-out parts of each category, greedily and sampled; says what changed and writes
    it to `out`.
    """
    cases = heldout.cases(per_category, min(per_category, VARIANTS), FIRST_SEED)
    changes = {}
    with progress_bar(console) as progress:
        bar = progress.add_task("held-out episodes", total=4 * len(cases))
        for way, temperature in (("greedy", 0.0), ("sampled", 1.0)):
            played = [
                play(policy, cases, reward, temperature, lambda: progress.advance(bar)) for policy in (before, after)
            ]
            changes[way] = compare(*played)
    table = Table("", f"{len(cases)} held-out parts", "before", "after", "difference, 95 % interval")
    for way, found in changes.items():
        for name, change in found.items():
            interval = f"{change.after - change.before:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            table.add_row(way, name.replace("_", " "), f"{change.before:.3f}", f"{change.after:.3f}", interval)
    console.print(table)
    write(out, changes)
    return changes


def play(
    checkpoint: Path, cases: Sequence[heldout.Case], reward: str, temperature: float, done: Callable[[], None]
) -> Played:
    outcomes = heldout.play_all(checkpoint, cases, done=done, temperature=temperature, probe=True)
    rewards = [score([outcome.trajectory], outcome.truth, reward)[0].total for outcome in outcomes]
    return Played(outcomes, rewards)


def compare(before: Played, after: Played) -> dict[str, Change]:
    """Reward, balanced accuracy, and how often a tool was used on parts that need one and on plain ones, where there
    are such parts.
    """
    verdicts = gate.compare(
        [outcome.anomalous for outcome in before.outcomes],
        [outcome.trajectory.verdict.anomaly_present for outcome in before.outcomes],
        [outcome.trajectory.verdict.anomaly_present for outcome in after.outcomes],
        margin=0.0,
    )
    changes = {
        "reward": mean_change(before.rewards, after.rewards),
        "balanced_accuracy": Change(verdicts.live, verdicts.candidate, verdicts.low, verdicts.high),
    }
    for name, chosen in _kinds(before.outcomes).items():
        if chosen:
            used = [[float(bool(played.outcomes[i].tools)) for i in chosen] for played in (before, after)]
            changes[f"tools_on_{name}"] = mean_change(*used)
    return changes


def mean_change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Interval by a paired bootstrap over the parts."""
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    difference = second - first
    drawn: npt.NDArray[np.int64] = np.random.default_rng(_SEED).integers(
        len(difference), size=(_RESAMPLES, len(difference))
    )
    low, high = np.quantile(difference[drawn].mean(axis=1), [0.025, 0.975])
    return Change(float(first.mean()), float(second.mean()), float(low), float(high))


def write(path: Path, changes: dict[str, dict[str, Change]]) -> None:
    """`changes`: by the way of playing, greedy or sampled."""
    rows = {way: {name: vars(change) for name, change in found.items()} for way, found in changes.items()}
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _kinds(outcomes: Sequence[heldout.Outcome]) -> dict[str, list[int]]:
    """Parts that nobody can judge without a tool but by luck, and clean textures, which a first look settles."""
    return {
        "parts_that_need_one": [i for i, outcome in enumerate(outcomes) if not outcome.plain],
        "plain_parts": [i for i, outcome in enumerate(outcomes) if outcome.plain],
    }
