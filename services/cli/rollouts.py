"""The rollouts that an RL run keeps, as the page of `inspect`: what the policy did and what reward it got."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from google.protobuf import json_format

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.cli import page
from services.cli.report import TRACES, write_evidence
from services.trainer.journal import Kept, kept

NOTE = "Of a few groups: the rollout with the best reward, then the one with the worst. The decision is its own answer."
# A rollout is judged by what it answered; this one only marks the middle of the score's scale.
_THRESHOLD = 0.5


def write_page(run: Path, out: Path, roots: Sequence[str]) -> int:
    """Writes `out`/index.html with its pictures and traces; returns the number of rollouts.

    `run`: the folder of the run's journal. `roots`: folders or URIs under which the images that rollouts saw may be
    read; one that cannot be read is shown as the reason. BadInput: there are no rollouts. ValueError: a root that
    cannot be used.
    """
    rollouts = kept(run)
    if not rollouts:
        raise BadInput(f"{run}: there are no rollouts in it")
    store = ImageStore(roots)
    (out / TRACES).mkdir(parents=True, exist_ok=True)
    rows = [_row(each, out, store) for each in rollouts]
    summary = page.Summary(f"Rollouts of {run.resolve().name}", NOTE, things="rollouts")
    page.write_page(out / "index.html", rows, summary)
    return len(rows)


def as_inspection(scored: events_pb2.TrajectoryScored) -> events_pb2.InspectionCompleted:
    """The rollout as if a plant had asked for it. The decision is its answer, which was sampled, whatever the score."""
    trajectory = scored.completed.trajectory
    inspection = events_pb2.InspectionCompleted(
        event_id=scored.event_id,
        category=trajectory.task.category,
        decision=_decision(trajectory),
        threshold=_THRESHOLD,
        policy_version=trajectory.policy_version,
        trajectory=trajectory,
    )
    if trajectory.HasField("verdict"):
        inspection.verdict.CopyFrom(trajectory.verdict)
    if trajectory.HasField("anomaly_probability"):
        inspection.raw_score = trajectory.anomaly_probability
    if trajectory.HasField("started_at") and trajectory.HasField("ended_at"):
        inspection.latency.FromTimedelta(trajectory.ended_at.ToDatetime() - trajectory.started_at.ToDatetime())
    return inspection


def _decision(trajectory: pb.Trajectory) -> events_pb2.Decision.ValueType:
    if not trajectory.HasField("verdict"):
        return events_pb2.DECISION_UNSPECIFIED
    return events_pb2.DECISION_REJECT if trajectory.verdict.anomaly_present else events_pb2.DECISION_PASS


def _row(rollout: Kept, out: Path, store: ImageStore) -> page.Row:
    scored, completed = rollout.scored, rollout.scored.completed
    inspection = as_inspection(scored)
    truth = completed.ground_truth if completed.HasField("ground_truth") else None
    trace = f"{TRACES}/{rollout.name}.json"
    text = json_format.MessageToJson(scored, preserving_proto_field_name=True)
    (out / trace).write_text(text, encoding="utf-8")
    return page.Row(
        unquote(PurePosixPath(completed.trajectory.task.image.reference.uri).name),
        inspection,
        truth=truth,
        evidence=write_evidence(out, rollout.name, inspection, store, truth),
        trace=trace,
        labels=(f"step {rollout.step}", f"reward {scored.reward.total:.2f}"),
        facts=(
            *((f"reward: {name}", f"{share:+.3f}") for name, share in sorted(scored.reward.components.items())),
            ("reward in all", f"{scored.reward.total:+.3f}"),
            ("rewarded by", scored.reward.preset or completed.reward_preset or "unknown"),
            ("group", f"{completed.group_id}, member {completed.member + 1} of {completed.group_size}"),
            ("temperature", f"{completed.trajectory.sampling.temperature:g}"),
        ),
    )
