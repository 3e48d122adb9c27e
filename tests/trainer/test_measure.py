"""Whether a policy is better than the one it began as: intervals of known cases, and real episodes of pocket."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from agentiad.v1 import trajectory_pb2 as pb
from services.agent.protocol import CROP, QUERY
from services.data import procedural
from services.policy.settings import PolicySettings
from services.reward.scoring import score
from services.trainer import heldout, measure
from services.trainer.measure import Played, compare, mean_change

POCKET = Path(PolicySettings.model_fields["checkpoint"].default)
# A clean texture, a smudged one, a scratched one, and a layout that nobody can judge from one picture.
KINDS: tuple[tuple[str, str | None, bool], ...] = (
    ("woven", None, False),
    ("woven", None, True),
    ("woven", "scratch", False),
    ("circuit", "missing", False),
)


def make_outcome(number: int, anomalous: bool, tools: Sequence[str] = ()) -> heldout.Outcome:
    """Of a part of the kind `number`."""
    category, defect, smudged = KINDS[number % len(KINDS)]
    part = procedural.make_part(category, 1, 1_000_000, defect, smudged=smudged)
    trajectory = pb.Trajectory(verdict=pb.Verdict(anomaly_present=anomalous))
    for name in tools:
        trajectory.turns.add(tool_call=pb.ToolCall(name=name))
        trajectory.turns.add(observation=pb.Observation(image=pb.ImageReference(uri="file:///crop.png")))
    return heldout.Outcome(part, trajectory)


def make_played(right: Sequence[bool], tools: Sequence[Sequence[str]]) -> Played:
    truths = [bool(KINDS[number % len(KINDS)][1]) for number in range(len(right))]
    outcomes = [make_outcome(i, truths[i] == right[i], tools[i]) for i in range(len(right))]
    return Played(outcomes, [float(each) for each in right])


def make_rewards(seed: int, count: int = 60) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.random.default_rng(seed).normal(size=count)


def test_no_change_is_no_change() -> None:
    rewards = make_rewards(0).tolist()
    change = mean_change(rewards, rewards)
    assert change.before == change.after == pytest.approx(np.mean(rewards))
    assert change.low == change.high == 0


def test_it_is_paired_so_that_easy_and_hard_parts_do_not_blur_it() -> None:
    """The same gain on every part, which lie far apart, is known exactly."""
    rewards = 100 * make_rewards(1)
    change = mean_change(rewards.tolist(), (rewards + 0.5).tolist())
    assert change.after - change.before == pytest.approx(0.5)
    assert (change.low, change.high) == pytest.approx((0.5, 0.5))
    shuffled = np.random.default_rng(2).permutation(rewards) + 0.5
    assert mean_change(rewards.tolist(), shuffled.tolist()).low < -1


def test_the_interval_is_that_of_the_normal_distribution_where_it_holds() -> None:
    gains = make_rewards(3, 2000) + 1
    change = mean_change([0.0] * 2000, gains.tolist())
    half = 1.96 * gains.std() / 2000**0.5
    assert (change.low, change.high) == pytest.approx((gains.mean() - half, gains.mean() + half), abs=0.1 * half)


def test_it_covers_the_true_difference_as_often_as_it_says() -> None:
    """200 sets of 60 parts: 95 % of 200, less four standard errors and what a bootstrap of 60 falls short of."""
    covered = 0
    for seed in range(200):
        before = make_rewards(10 + seed)
        change = mean_change(before.tolist(), (before + 0.3 + make_rewards(1000 + seed)).tolist())
        covered += change.low <= 0.3 <= change.high
    assert 174 <= covered < 200


def test_the_same_episodes_give_the_same_interval() -> None:
    before, after = make_rewards(4).tolist(), make_rewards(5).tolist()
    assert mean_change(before, after) == mean_change(before, after)


def test_tools_are_counted_on_parts_that_need_one_and_on_plain_ones() -> None:
    before = make_played([False] * 16, [()] * 16)
    # The clean textures are every fourth.
    after = make_played([True] * 16, [(), (CROP,), (CROP, QUERY), (QUERY,)] * 3 + [(CROP,), (), (), ()])
    found = compare(before, after)
    assert set(found) == {"reward", "balanced_accuracy", "tools_on_parts_that_need_one", "tools_on_plain_parts"}
    needed, plain = found["tools_on_parts_that_need_one"], found["tools_on_plain_parts"]
    assert (needed.before, needed.after) == (0, 0.75)
    assert (plain.before, plain.after) == (0, 0.25)
    assert (found["reward"].before, found["reward"].after) == (0, 1)
    accuracy = found["balanced_accuracy"]
    assert (accuracy.before, accuracy.after) == (0, 1)
    assert 0 < accuracy.low < accuracy.high <= 1


def test_without_plain_parts_nothing_is_said_of_them() -> None:
    outcomes = [make_outcome(number, True) for number in (1, 2, 3)]
    assert "tools_on_plain_parts" not in compare(Played(outcomes, [0.0] * 3), Played(outcomes, [1.0] * 3))


def test_a_policy_against_itself_changes_nothing(tmp_path: Path) -> None:
    """Greedy and sampled, on real episodes with probes: the seeds are the same."""
    text = io.StringIO()
    found = measure.report(POCKET, POCKET, "gated", 2, tmp_path / "change.json", Console(file=text, width=160))
    assert set(found) == {"greedy", "sampled"}
    for way in found.values():
        # Parts that differ nowhere still leave some doubt of the accuracy.
        assert all(change.before == pytest.approx(change.after, abs=1e-5) for change in way.values())
        assert way["reward"].low == pytest.approx(way["reward"].high, abs=1e-5)
        assert way["reward"].before > 0
        assert way["balanced_accuracy"].before > 0.5
    written = json.loads((tmp_path / "change.json").read_text())
    assert written == {way: {name: vars(change) for name, change in each.items()} for way, each in found.items()}
    for words in ("12 held-out parts", "greedy", "sampled", "balanced accuracy", "+0.000"):
        assert words in text.getvalue()


def test_played_episodes_are_probed_and_scored_by_their_truth() -> None:
    cases = heldout.cases(1, 1, measure.FIRST_SEED)
    ended: list[None] = []
    played = measure.play(POCKET, cases, "gated", 0.0, lambda: ended.append(None))
    assert len(ended) == len(played.outcomes) == len(played.rewards) == len(cases)
    assert [outcome.part for outcome in played.outcomes] == [case.part for case in cases]
    used = [outcome for outcome in played.outcomes if outcome.tools]
    assert used
    for outcome in used:
        assert any(turn.HasField("forced_anomaly_probability") for turn in outcome.trajectory.turns)
    for outcome, reward in zip(played.outcomes, played.rewards, strict=True):
        assert reward == score([outcome.trajectory], outcome.truth, "gated")[0].total
        assert outcome.truth.anomaly_present == outcome.anomalous
