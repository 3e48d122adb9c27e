"""What the worker refuses, and what it makes of a group."""

from __future__ import annotations

import pytest

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.bus import MAX_EVENT_BYTES
from services.chassis.errors import BadInput
from services.reward import groups
from services.reward.scoring import score
from tests.reward.trajectories import NORMAL, make_completed, make_truth

Completed = events_pb2.TrajectoryCompleted


def changed(**fields: object) -> Completed:
    """A good event but for the fields; None takes one away."""
    completed = make_completed("g", 1)
    for name, value in fields.items():
        if value is None:
            completed.ClearField(name)  # type: ignore[arg-type]
        else:
            completed.MergeFrom(Completed(**{name: value}))  # type: ignore[arg-type]
    return completed


def test_a_good_event_is_read_as_it_is() -> None:
    completed = make_completed("g", 2, truth=NORMAL)
    assert groups.parse_completed(completed.SerializeToString()) == completed


@pytest.mark.parametrize(
    ("completed", "reason"),
    [
        (changed(group_id=None), "group_id must be 1 to 200 printable characters"),
        (changed(group_id="two\nlines"), "group_id"),
        (changed(group_id="g" * 201), "group_id"),
        (changed(member=3), "member 3 must be below group_size 3"),
        (changed(group_size=None), "group_size must lie between 1 and 1024, not 0"),
        (changed(group_size=1025), "group_size must lie between 1 and 1024, not 1025"),
        (changed(trajectory=None), "^trajectory is missing$"),
        (changed(ground_truth=None), "^ground_truth is missing$"),
        (changed(reward_preset="best"), "reward_preset: there is no reward preset 'best'"),
        (changed(reward_preset="gated-speed"), "reward_preset: gated has no component 'speed'"),
        (changed(trajectory=pb.Trajectory(ended_at={"seconds": 2**60})), "ended_at is out of range"),  # type: ignore[arg-type]
        (changed(trajectory=pb.Trajectory(episode_id="e" * 996_500)), "leave no room for the reward"),
        (changed(group_size=0, trajectory=None, member=5), "member 5 .*; trajectory is missing"),
    ],
)
def test_bad_events_are_refused_with_everything_that_is_wrong(completed: Completed, reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        groups.parse_completed(completed.SerializeToString())


def test_what_is_no_protobuf_is_refused() -> None:
    with pytest.raises(BadInput, match=r"not an agentiad\.v1\.TrajectoryCompleted"):
        groups.parse_completed(b"\xff\xff\xff")


@pytest.mark.parametrize(
    ("completed", "parts"),
    [
        (changed(group_size=4), "group_size"),
        (changed(reward_preset="paper"), "reward_preset"),
        (changed(ground_truth=make_truth(types=["dent"])), "ground_truth"),
        (changed(group_size=4, reward_preset="gated"), "group_size and reward_preset"),
    ],
)
def test_members_that_differ_are_refused(completed: Completed, parts: str) -> None:
    agreed = groups.terms(make_completed("g", 0))
    groups.check_terms(make_completed("g", 2), agreed)
    with pytest.raises(BadInput, match=f"member 1 differs from its group 'g' in {parts}$"):
        groups.check_terms(completed, agreed)


def test_members_agree_on_a_truth_that_is_no_number() -> None:
    odd = make_truth((float("nan"), 0, 1, 1))
    groups.check_terms(make_completed("g", 1, truth=odd), groups.terms(make_completed("g", 0, truth=odd)))


def test_a_group_is_scored_together() -> None:
    members = [make_completed("g", number, preset="paper") for number in range(3)]
    scored = groups.score_group([member.SerializeToString() for member in members])
    assert [each.event_id for each in scored] == ["g/0", "g/1", "g/2"]
    assert [each.completed for each in scored] == members
    alone = score([member.trajectory for member in members], members[0].ground_truth, "paper")
    assert [each.reward for each in scored] == alone
    # One of three compared.
    assert scored[0].reward.components["query_rate"] == pytest.approx(0.5 * (1 / 3 - 1))


def test_the_largest_event_still_has_room_for_its_reward() -> None:
    completed = make_completed("g" * 200, 0, 1)
    completed.trajectory.episode_id += "e" * (MAX_EVENT_BYTES - 4096 - completed.ByteSize() - 3)
    value = completed.SerializeToString()
    assert len(value) > MAX_EVENT_BYTES - 4096 - 5
    groups.parse_completed(value)
    (scored,) = groups.score_group([value])
    assert scored.ByteSize() < MAX_EVENT_BYTES - 3000
