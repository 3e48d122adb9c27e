"""What holds of every preset: names, sums, finite numbers, no order, the same bytes."""

from __future__ import annotations

import math
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentiad.v1 import trajectory_pb2 as pb
from services.reward import presets
from services.reward.scoring import score
from tests.reward import trajectories as make
from tests.reward.strategies import PATIENT, PRESETS, trajectories, truths
from tests.reward.trajectories import DEFECT

TRUTH = make.make_truth(DEFECT, types=["scratch"])
GATED = {"verdict", "crop", "box", "type", "format", "tools"}


def make_good() -> pb.Trajectory:
    """Every component of `gated` but `format` is above 0."""
    return make.make_trajectory(
        make.malformed(), make.crop(DEFECT, probe=0.1), verdict=make.make_verdict(True, "scratch", DEFECT)
    )


@pytest.mark.parametrize(
    ("preset", "counting"),
    [
        ("", GATED),
        ("gated", GATED),
        ("gated-type-format", {"verdict", "crop", "box", "tools"}),
        ("gated-verdict-crop-box-type-format-tools", set()),
        ("paper", {"verdict", "localisation", "type", "outcome", "query_rate"}),
        ("paper-query_rate-outcome", {"verdict", "localisation", "type"}),
        ("paper-as-run", {"verdict", "localisation", "type", "query_rate"}),
        ("paper-as-run-query_rate", {"verdict", "localisation", "type"}),
    ],
)
def test_what_is_ablated_counts_nothing(preset: str, counting: set[str]) -> None:
    group = [make_good()]
    if preset.startswith("paper"):
        del group[0].turns[2:4]  # the malformed reply, of which only `gated` has a component
    (reward,) = score(group, TRUTH, preset)
    assert {name for name, value in reward.components.items() if value} == counting
    assert reward.total == math.fsum(reward.components.values())
    assert reward.preset == preset
    assert set(reward.components) == set(presets.parse(preset).names)


@pytest.mark.parametrize(
    ("preset", "reason"),
    [
        ("best", "no reward preset 'best', only gated, paper-as-run, paper"),
        ("Gated", "no reward preset"),
        ("gated-speed", "gated has no component 'speed', only verdict, crop, box, type, format, tools"),
        ("gated-", "no component ''"),
        ("-type", "no reward preset"),
        ("gatedtype", "no reward preset"),
        ("paper-as", "paper has no component 'as'"),
        ("paper-as-run-outcome", "paper-as-run has no component 'outcome'"),
        ("gated-type-type", "twice"),
    ],
)
def test_unknown_presets_are_refused(preset: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        score([make_good()], TRUTH, preset)


def test_no_trajectories_are_refused() -> None:
    with pytest.raises(ValueError, match="no trajectories"):
        score([], TRUTH, "gated")


groups = st.lists(trajectories(), min_size=1, max_size=4)
any_preset = st.sampled_from(PRESETS)


@PATIENT
@given(groups, truths(), any_preset)
def test_every_number_is_finite_and_bounded(group: list[pb.Trajectory], truth: pb.GroundTruth, preset: str) -> None:
    rewards = score(group, truth, preset)
    assert len(rewards) == len(group)
    for reward in rewards:
        assert all(math.isfinite(value) and -1 <= value <= 1 for value in reward.components.values())
        assert reward.total == math.fsum(reward.components.values())


@PATIENT
@given(groups, truths(), any_preset, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(
    group: list[pb.Trajectory], truth: pb.GroundTruth, preset: str, random: Random
) -> None:
    order = random.sample(range(len(group)), len(group))
    shuffled = score([group[index] for index in order], truth, preset)
    rewards = score(group, truth, preset)
    assert shuffled == [rewards[index] for index in order]


@PATIENT
@given(groups, truths(), any_preset)
def test_the_same_records_give_the_same_bytes(group: list[pb.Trajectory], truth: pb.GroundTruth, preset: str) -> None:
    copies = [pb.Trajectory.FromString(trajectory.SerializeToString()) for trajectory in group]
    first, second = score(group, truth, preset), score(copies, truth, preset)
    assert [r.SerializeToString(deterministic=True) for r in first] == [
        r.SerializeToString(deterministic=True) for r in second
    ]
