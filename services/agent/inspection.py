"""From an event to a task, from a finished trajectory to an inspection. Pure."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from google.protobuf.message import DecodeError

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput

_SHA256 = re.compile(r"[0-9a-f]{64}")
# Names become Kafka keys, Redis keys and log fields: short, printable, one line.
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")


@dataclass(frozen=True)
class DecisionRule:
    """Scores within `review_band` of the threshold go to a person; above it rejects, below it passes."""

    threshold: float
    review_band: float

    def decide(self, trajectory: pb.Trajectory) -> events_pb2.Decision.ValueType:
        """REVIEW also where the episode ran out of time or gave no score that is a number."""
        if trajectory.stop_reason == pb.STOP_REASON_LATENCY_BUDGET or not trajectory.HasField("anomaly_probability"):
            return events_pb2.DECISION_REVIEW
        score = trajectory.anomaly_probability
        if not math.isfinite(score):
            return events_pb2.DECISION_REVIEW
        if self.review_band > 0 and abs(score - self.threshold) <= self.review_band:
            return events_pb2.DECISION_REVIEW
        return events_pb2.DECISION_REJECT if score >= self.threshold else events_pb2.DECISION_PASS


def parse_captured(value: bytes) -> events_pb2.ImageCaptured:
    """The event that a plant published. Raises BadInput with everything that is wrong with it."""
    try:
        captured = events_pb2.ImageCaptured.FromString(value)
    except DecodeError:
        raise BadInput("the body is not an agentiad.v1.ImageCaptured") from None
    check_captured(captured)
    return captured


def check_captured(captured: events_pb2.ImageCaptured) -> None:
    """Raises BadInput with everything that is wrong with the event."""
    wrong = [
        f"{name} must be 1 to 200 printable characters"
        for name in ("event_id", "line", "category")
        if not _NAME.fullmatch(getattr(captured, name))
    ]
    if not captured.image.uri:
        wrong.append("image.uri is empty")
    if not _SHA256.fullmatch(captured.image.sha256):
        wrong.append("image.sha256 must be 64 lower-case hex digits")
    try:
        if captured.HasField("latency_budget") and captured.latency_budget.ToTimedelta() <= timedelta():
            wrong.append("latency_budget must be positive")
    except (ValueError, OverflowError):
        wrong.append("latency_budget is out of range")
    try:
        captured.captured_at.ToDatetime()
    except (ValueError, OverflowError):
        wrong.append("captured_at is out of range")
    if wrong:
        raise BadInput("; ".join(wrong))


def task_of(captured: events_pb2.ImageCaptured) -> pb.Task:
    return pb.Task(image=pb.Image(reference=captured.image), category=captured.category)


def not_begun(captured: events_pb2.ImageCaptured, limits: pb.Limits) -> pb.Trajectory:
    """The trajectory of an episode that no policy took up."""
    return pb.Trajectory(episode_id=captured.event_id, task=task_of(captured), limits=limits)


def seconds_left(captured: events_pb2.ImageCaptured, now: datetime) -> float | None:
    """Seconds until the latency budget runs out, not below 0; None when the plant set none."""
    if not captured.HasField("latency_budget"):
        return None
    spent = now - _captured_at(captured, now)
    return max(0.0, (captured.latency_budget.ToTimedelta() - spent).total_seconds())


def complete(
    captured: events_pb2.ImageCaptured, trajectory: pb.Trajectory, rule: DecisionRule, now: datetime
) -> events_pb2.InspectionCompleted:
    """What the plant is told."""
    inspection = events_pb2.InspectionCompleted(
        event_id=captured.event_id,
        line=captured.line,
        category=captured.category,
        unit=captured.unit,
        lot=captured.lot,
        decision=rule.decide(trajectory),
        verdict=trajectory.verdict,
        threshold=rule.threshold,
        review_band=rule.review_band,
        policy_version=trajectory.policy_version,
        trajectory=trajectory,
    )
    if trajectory.HasField("anomaly_probability"):
        inspection.raw_score = trajectory.anomaly_probability
    inspection.latency.FromTimedelta(now - _captured_at(captured, now))
    inspection.completed_at.FromDatetime(now)
    return inspection


def _captured_at(captured: events_pb2.ImageCaptured, now: datetime) -> datetime:
    return captured.captured_at.ToDatetime(tzinfo=UTC) if captured.HasField("captured_at") else now
