"""What a batch of scored rollouts says of a policy."""

from __future__ import annotations

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.events_pb2 import TrajectoryScored
from services.agent.protocol import CROP, QUERY
from services.trainer.rollout_metrics import Call, busy_s, calls_of, rollout_metrics, tokens_of
from tests.trainer.make_rollouts import make_scored, make_trajectory


def make_rollout(
    *calls: tuple[str, float | None, str],
    anomalous: bool = True,
    truth: bool = True,
    stop: pb.StopReason.ValueType = pb.STOP_REASON_ANSWERED,
    **components: float,
) -> TrajectoryScored:
    """`calls`: (tool, probe, error of its answer)."""
    trajectory = make_trajectory((), anomalous=anomalous, stop=stop)
    for name, probe, error in calls:
        trajectory.turns.add(
            tool_call=pb.ToolCall(name=name),
            generation=pb.Generation(token_ids=[1, 2, 3]),
            forced_anomaly_probability=probe,
        )
        shown = pb.Observation(image=pb.ImageReference(uri="file:///crop.png"))
        trajectory.turns.add(observation=pb.Observation(tool_error=error) if error else shown)
    trajectory.turns.add(generation=pb.Generation(token_ids=[4, 5]))
    scored = make_scored("run/000000-0", 0, total=sum(components.values()), trajectory=trajectory, truth=truth)
    scored.reward.components.update(components)
    return scored


def make_span(start_s: float, end_s: float) -> TrajectoryScored:
    trajectory = make_trajectory()
    trajectory.started_at.FromNanoseconds(int(start_s * 1e9))
    trajectory.ended_at.FromNanoseconds(int(end_s * 1e9))
    return make_scored("run/000000-0", 0, trajectory=trajectory)


def test_rewards_accuracy_and_format_are_means_over_rollouts() -> None:
    found = rollout_metrics(
        [
            make_rollout(accuracy=1.0, format=0.5),
            make_rollout(accuracy=0.0, stop=pb.STOP_REASON_MALFORMED, anomalous=False),
            make_rollout(accuracy=1.0, stop=pb.STOP_REASON_LIMIT, anomalous=False, truth=False),
            make_rollout(accuracy=0.0, truth=False),
        ]
    )
    assert found["reward/total"] == pytest.approx(2.5 / 4)
    assert found["reward/accuracy"] == pytest.approx(0.5)
    assert found["reward/format"] == pytest.approx(0.125)
    assert found["accuracy/sampled"] == pytest.approx(0.5)
    assert (found["format/malformed"], found["format/limit"]) == (0.25, 0.25)


def test_a_rollout_without_a_verdict_is_not_right() -> None:
    rollout = make_rollout(anomalous=False, truth=False)
    rollout.completed.trajectory.ClearField("verdict")
    assert rollout_metrics([rollout])["accuracy/sampled"] == 0


def test_a_tools_worth_is_what_the_verdict_gained_by_it() -> None:
    found = rollout_metrics(
        [
            make_rollout((CROP, 0.2, ""), (QUERY, 0.9, "")),  # the crop turned it right, the query changed nothing
            make_rollout((CROP, 0.9, "")),
            make_rollout((CROP, 0.9, ""), anomalous=False),  # lost by it
            make_rollout((CROP, 0.2, "")),
        ]
    )
    assert found["tools/crop_worth"] == pytest.approx((1 + 0 - 1 + 1) / 4)
    assert found["tools/query_worth"] == 0
    assert (found["tools/crop_rate"], found["tools/query_rate"], found["tools/calls"]) == (1.0, 0.25, 1.25)


def test_calls_without_pixels_and_calls_without_probes_say_nothing_of_worth() -> None:
    refused, unprobed = make_rollout((CROP, 0.2, "too small")), make_rollout((QUERY, None, ""))
    assert list(calls_of(refused)) == []
    assert list(calls_of(unprobed)) == [Call("query", None)]
    found = rollout_metrics([refused, unprobed])
    assert found["tools/calls"] == 0.5
    assert not [name for name in found if name.endswith("_worth")]


def test_the_forced_verdict_is_right_at_the_half_as_the_agent_reads_it() -> None:
    probes = [(0.5, True), (0.49, True), (0.5, False), (0.49, False)]
    found = [next(calls_of(make_rollout((CROP, probe, ""), truth=truth))).forced_right for probe, truth in probes]
    assert found == [True, False, False, True]


def test_tokens_are_those_that_the_policy_chose() -> None:
    assert tokens_of([make_rollout((CROP, 0.2, ""), (QUERY, 0.2, "no")), make_rollout()]) == 8 + 2


@pytest.mark.parametrize(
    ("spans", "busy"),
    [
        ([], 0.0),
        ([(110, 120)], 10.0),
        ([(110, 120), (115, 130)], 20.0),
        ([(115, 130), (110, 120)], 20.0),
        ([(110, 140), (115, 120)], 30.0),
        ([(110, 120), (130, 140.5)], 20.5),
        ([(50, 110)], 10.0),
        ([(190, 250)], 10.0),
        ([(50, 90), (210, 250)], 0.0),
        ([(50, 250)], 100.0),
    ],
)
def test_time_under_way_is_counted_once(spans: list[tuple[float, float]], busy: float) -> None:
    assert busy_s([make_span(*span) for span in spans], 100.0, 200.0) == pytest.approx(busy)
