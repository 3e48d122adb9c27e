"""Outcomes as a folder: an evidence picture and a trace an image, and the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from google.protobuf import json_format

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.images import ImageStore
from services.cli.evidence import evidence
from services.cli.inspecting import Outcome
from services.cli.page import Row, Summary, write_page

# Where the whole inspections lie as JSON, beside the page.
TRACES = "traces"


def write_trace(directory: Path, outcome: Outcome) -> Path | None:
    """The whole inspection as JSON under `directory`; None where there is none."""
    if outcome.inspection is None:
        return None
    path = directory / TRACES / f"{outcome.inspection.event_id}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json_format.MessageToJson(outcome.inspection, preserving_proto_field_name=True), encoding="utf-8")
    return path


def write_evidence(
    out: Path, name: str, inspection: events_pb2.InspectionCompleted, store: ImageStore, truth: pb.GroundTruth | None
) -> str:
    """Draws the picture of an inspection under `out`; returns its file, relative to `out`. `name`: without a suffix."""
    file = Path("evidence", name + ".jpg")
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    picture = evidence(inspection, lambda reference: store.load(pb.Image(reference=reference)), truth)
    # JPEG: a quarter of a PNG's size and forty times as fast to write.
    picture.save(out / file, quality=88)
    return str(file)


def write_report(out: Path, outcomes: Sequence[Outcome], store: ImageStore, summary: Summary | None = None) -> Path:
    """The page and its pictures, beside traces that are there already. Returns the page's path."""
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, outcome in enumerate(outcomes):
        file = trace = None
        if outcome.inspection is not None:
            name = f"{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', outcome.item.path.stem)[:80]}"
            file = write_evidence(out, name, outcome.inspection, store, outcome.item.truth)
            trace = f"{TRACES}/{outcome.inspection.event_id}.json"
        rows.append(Row(outcome.item.name, outcome.inspection, outcome.error, outcome.item.truth, file, trace))
    page = out / "index.html"
    write_page(page, rows, summary)
    return page
