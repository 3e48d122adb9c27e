"""Events at the edge, and what a finished trajectory means to a plant."""

import math
from datetime import UTC, datetime, timedelta

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import inspection
from services.agent.inspection import DecisionRule
from services.chassis.errors import BadInput

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)


def make_captured(**changes: object) -> events_pb2.ImageCaptured:
    captured = events_pb2.ImageCaptured(
        event_id="e1", line="L1", category="bolt", unit="u", lot="l",
        image=pb.ImageReference(uri="file:///a.png", sha256="a" * 64, media_type="image/png", width=8, height=8),
    )  # fmt: skip
    captured.captured_at.FromDatetime(NOW)
    for name, value in changes.items():
        setattr(captured, name, value)
    return captured


def make_finished(score: float | None, reason: "pb.StopReason.ValueType" = pb.STOP_REASON_ANSWERED) -> pb.Trajectory:
    trajectory = pb.Trajectory(episode_id="e1", stop_reason=reason, policy_version="v1")
    if score is not None:
        trajectory.anomaly_probability = score
    return trajectory


def with_budget(seconds: float) -> events_pb2.ImageCaptured:
    captured = make_captured()
    captured.latency_budget.FromTimedelta(timedelta(seconds=seconds))
    return captured


def with_time(seconds: int, nanos: int = 0) -> bytes:
    captured = make_captured()
    captured.captured_at.CopyFrom(Timestamp(seconds=seconds, nanos=nanos))
    return captured.SerializeToString()


def with_raw_budget(seconds: int, nanos: int = 0) -> bytes:
    captured = make_captured()
    captured.latency_budget.CopyFrom(Duration(seconds=seconds, nanos=nanos))
    return captured.SerializeToString()


HOSTILE_EVENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "event_id must be"),
    "not a protobuf": (b"\xff\xff\xff\xff", "not an agentiad.v1.ImageCaptured"),
    "JSON": (b'{"event_id": "e1"}', "not an agentiad.v1.ImageCaptured"),
    "cut off": (make_captured().SerializeToString()[:-3], "not an agentiad.v1.ImageCaptured"),
    "another message": (pb.Box(x_min=1).SerializeToString(), "event_id must be"),
    "text that is not UTF-8": (b"\x0a\x02\xc3\x28", "not an agentiad.v1.ImageCaptured"),
    "no event id": (make_captured(event_id="").SerializeToString(), "event_id must be"),
    "no line": (make_captured(line="").SerializeToString(), "line must be"),
    "no category": (make_captured(category="").SerializeToString(), "category must be"),
    "line with a line break": (make_captured(line="a\nb").SerializeToString(), "line must be"),
    "category with a NUL": (make_captured(category="a\0b").SerializeToString(), "category must be"),
    "event id of a megabyte": (make_captured(event_id="x" * 2**20).SerializeToString(), "event_id must be"),
    "no image": (
        events_pb2.ImageCaptured(event_id="e", line="l", category="c").SerializeToString(),
        "image.uri is empty",
    ),
    "digest of another length": (
        events_pb2.ImageCaptured(
            event_id="e", line="l", category="c", image=pb.ImageReference(uri="file:///a", sha256="ab")
        ).SerializeToString(),
        "image.sha256 must be",
    ),
    "digest in capitals": (
        events_pb2.ImageCaptured(
            event_id="e", line="l", category="c", image=pb.ImageReference(uri="file:///a", sha256="A" * 64)
        ).SerializeToString(),
        "image.sha256 must be",
    ),
    "negative budget": (with_budget(-1).SerializeToString(), "latency_budget must be positive"),
    "budget beyond all ranges": (with_raw_budget(2**62), "latency_budget is out of range"),
    "captured in the year 300 million": (with_time(2**53), "captured_at is out of range"),
    "captured before all time": (with_time(-(2**53)), "captured_at is out of range"),
    "captured at negative nanoseconds": (with_time(5, -7), "captured_at is out of range"),
    "budget of nothing": (with_budget(0).SerializeToString(), "latency_budget must be positive"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_EVENTS)
def test_bad_events_are_refused_with_their_reason(name: str) -> None:
    value, reason = HOSTILE_EVENTS[name]
    with pytest.raises(BadInput, match=reason):
        inspection.parse_captured(value)


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(BadInput, match=r"event_id.*line.*category.*uri.*sha256"):
        inspection.parse_captured(b"")


def test_good_events_pass() -> None:
    assert inspection.parse_captured(make_captured().SerializeToString()) == make_captured()


@pytest.mark.parametrize(
    ("score", "band", "decision"),
    [
        (0.9, 0.0, events_pb2.DECISION_REJECT),
        (0.5, 0.0, events_pb2.DECISION_REJECT),
        (0.499, 0.0, events_pb2.DECISION_PASS),
        (0.65, 0.2, events_pb2.DECISION_REVIEW),
        (0.35, 0.2, events_pb2.DECISION_REVIEW),
        (0.75, 0.2, events_pb2.DECISION_REJECT),
        (0.25, 0.2, events_pb2.DECISION_PASS),
        (None, 0.0, events_pb2.DECISION_REVIEW),
        (math.nan, 0.0, events_pb2.DECISION_REVIEW),
    ],
)
def test_scores_become_decisions(score: float | None, band: float, decision: int) -> None:
    assert DecisionRule(0.5, band).decide(make_finished(score)) == decision


def test_out_of_time_goes_to_a_person() -> None:
    trajectory = make_finished(0.99, pb.STOP_REASON_LATENCY_BUDGET)
    assert DecisionRule(0.5, 0.0).decide(trajectory) == events_pb2.DECISION_REVIEW


def test_the_budget_counts_from_the_capture() -> None:
    captured = with_budget(2)
    assert inspection.seconds_left(captured, NOW + timedelta(seconds=0.5)) == pytest.approx(1.5)
    assert inspection.seconds_left(captured, NOW + timedelta(seconds=9)) == 0
    assert inspection.seconds_left(make_captured(), NOW) is None


def test_the_inspection_answers_its_event() -> None:
    done = inspection.complete(make_captured(), make_finished(0.25), DecisionRule(0.5, 0.1), NOW + timedelta(seconds=3))
    assert (done.event_id, done.line, done.unit, done.lot) == ("e1", "L1", "u", "l")
    assert done.raw_score == pytest.approx(0.25)
    assert (done.threshold, done.policy_version) == (0.5, "v1")
    assert done.latency.ToTimedelta() == timedelta(seconds=3)
    assert not inspection.complete(make_captured(), make_finished(None), DecisionRule(0.5, 0), NOW).HasField(
        "raw_score"
    )
