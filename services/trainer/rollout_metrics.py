"""What a batch of scored rollouts says of a policy. Pure."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.events_pb2 import TrajectoryScored
from services.agent import protocol
from services.trainer.groups import right

_TOOLS = {protocol.CROP: "crop", protocol.QUERY: "query"}


@dataclass(frozen=True)
class Call:
    """A tool call that was answered with pixels. `forced_right`: of the verdict forced before it; None: not probed."""

    tool: str
    forced_right: bool | None


def rollout_metrics(scored: Sequence[TrajectoryScored]) -> dict[str, float]:
    """Means over rollouts; rates are shares of the rollouts that used a tool; a tool's worth is how much more often the
    final verdict was right than the one forced just before its calls. What has no rollouts to speak of is left out.
    """
    metrics = {"reward/total": _mean([each.reward.total for each in scored])}
    for name in sorted({name for each in scored for name in each.reward.components}):
        metrics[f"reward/{name}"] = _mean([each.reward.components[name] for each in scored])
    metrics["accuracy/sampled"] = _mean([right(each) for each in scored])
    calls = [list(calls_of(each)) for each in scored]
    metrics["tools/calls"] = _mean([len(each) for each in calls])
    gains: dict[str, list[float]] = defaultdict(list)
    for each, made in zip(scored, calls, strict=True):
        for call in made:
            if call.forced_right is not None:
                gains[call.tool].append(float(right(each)) - float(call.forced_right))
    for name in _TOOLS.values():
        metrics[f"tools/{name}_rate"] = _mean([any(call.tool == name for call in made) for made in calls])
        if gains[name]:
            metrics[f"tools/{name}_worth"] = _mean(gains[name])
    stops = [each.completed.trajectory.stop_reason for each in scored]
    metrics["format/malformed"] = _mean([stop == pb.STOP_REASON_MALFORMED for stop in stops])
    metrics["format/limit"] = _mean([stop == pb.STOP_REASON_LIMIT for stop in stops])
    return metrics


def calls_of(scored: TrajectoryScored) -> Iterator[Call]:
    truth = scored.completed.ground_truth.anomaly_present
    for turn, answer in itertools.pairwise(scored.completed.trajectory.turns):
        if turn.tool_call.name in _TOOLS and answer.observation.HasField("image"):
            probed = turn.HasField("forced_anomaly_probability")
            forced = (turn.forced_anomaly_probability >= 0.5) == truth if probed else None
            yield Call(_TOOLS[turn.tool_call.name], forced)


def tokens_of(scored: Sequence[TrajectoryScored]) -> int:
    """How many tokens the policy chose."""
    return sum(len(turn.generation.token_ids) for each in scored for turn in each.completed.trajectory.turns)


def busy_s(scored: Sequence[TrajectoryScored], since: float, until: float) -> float:
    """Seconds between two Unix times in which at least one of the episodes was under way."""
    spans = sorted((_seconds(t.started_at), _seconds(t.ended_at)) for t in (s.completed.trajectory for s in scored))
    busy, covered = 0.0, since
    for start, end in spans:
        start, end = max(start, covered), min(end, until)
        if end > start:
            busy, covered = busy + end - start, end
    return busy


def _seconds(stamp: object) -> float:
    return float(stamp.seconds + stamp.nanos / 1e9)  # type: ignore[attr-defined]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
