"""An inspection as the command line shows it: one flat row an image. Pure."""

from __future__ import annotations

from typing import Any

from agentiad.v1 import events_pb2
from services.agent import episode, protocol
from services.cli.story import DECISIONS

COLOURS = {"pass": "green", "reject": "red", "review": "yellow"}


def row(image: str, inspection: events_pb2.InspectionCompleted, trace: str | None) -> dict[str, Any]:
    """What `inspect --json` prints for an image. `trace`: where the whole trajectory lies, as JSON."""
    verdict, trajectory = inspection.verdict, inspection.trajectory
    return {
        "image": image,
        "decision": DECISIONS[inspection.decision],
        "anomaly": verdict.anomaly_present,
        "score": round(inspection.raw_score, 4) if inspection.HasField("raw_score") else None,
        "type": verdict.top_anomaly,
        "box": [round(value, 4) for value in protocol.box_tuple(verdict.box)] if verdict.HasField("box") else None,
        "turns": sum(turn.HasField("generation") for turn in trajectory.turns),
        "tools": episode.tools_used(trajectory),
        "category": inspection.category,
        "category_known": trajectory.category_known,
        "policy_version": inspection.policy_version,
        "trace": trace,
    }


def readable(name: str) -> str:
    """A file's name as text: bytes that are no UTF-8 are written out."""
    return name.encode("utf-8", "backslashreplace").decode()
