"""Outcomes as a folder: an evidence picture an image, and the page that shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.images import ImageStore
from services.cli.evidence import evidence
from services.cli.inspecting import Outcome
from services.cli.page import Row, Summary, write_page


def write_report(out: Path, outcomes: Sequence[Outcome], store: ImageStore, summary: Summary | None = None) -> Path:
    """Returns the page's path."""
    pictures = out / "evidence"
    pictures.mkdir(parents=True, exist_ok=True)
    rows = []
    for number, outcome in enumerate(outcomes):
        file = None
        if outcome.inspection is not None:
            file = f"evidence/{number:04d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', outcome.item.path.stem)[:80]}.png"
            picture = evidence(
                outcome.inspection, lambda reference: store.load(pb.Image(reference=reference)), outcome.item.truth
            )
            picture.save(out / file)
        rows.append(Row(outcome.item.name, outcome.inspection, outcome.error, outcome.item.truth, file))
    page = out / "index.html"
    write_page(page, rows, summary)
    return page
