"""`python -m services.cli.picture DEMO OUT`: draws the README's picture from a demo's folder.

It is the first part, in the order of the manifest, that was rejected rightly after a comparison and a closer look.
"""

import sys
from pathlib import Path

from google.protobuf import json_format
from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.agent.episode import tools_used
from services.chassis.images import ImageStore
from services.cli.demo import item_of
from services.cli.evidence import evidence
from services.cli.report import TRACES
from services.data.readers import read

WIDTH = 1100


def main(demo: Path, out: Path) -> None:
    store = ImageStore([str(demo.resolve())])
    inspections = {}
    for trace in (demo / TRACES).iterdir():
        inspection = json_format.Parse(trace.read_text(), events_pb2.InspectionCompleted())
        inspections[inspection.unit] = inspection
    for item in map(item_of, read(demo / "parts")):
        found = inspections.get(item.name[:200])
        if (
            found is not None
            and item.truth is not None
            and item.truth.anomaly_present
            and found.decision == events_pb2.DECISION_REJECT
            and tools_used(found.trajectory) == [protocol.QUERY, protocol.CROP]
        ):
            picture = evidence(found, lambda reference: store.load(pb.Image(reference=reference)), item.truth)
            size = (WIDTH, round(picture.height * WIDTH / picture.width))
            picture.resize(size, Image.Resampling.LANCZOS).save(out, quality=85)
            return
    sys.exit("no part of this demo was rejected rightly after a comparison and a closer look")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
