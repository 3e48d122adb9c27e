"""Image events in, verdicts out, through real processes, while one agent is killed in the middle of its work."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import online
from services.chassis import topics
from services.chassis.bus import Event, cloudevents
from services.cli.plant import SOURCE, publish_image
from tests.e2e.stack import Stack, stack
from tests.harness.kafka import kafka
from tests.harness.milvus import milvus

EVENTS = 200
LINES = ("L1", "L2", "L3", "L4")


KAFKA, TRITON, VLLM = pytest.mark.kafka, pytest.mark.triton, pytest.mark.vllm


@pytest.fixture(
    params=["embedded", pytest.param("kafka", marks=[KAFKA, TRITON]), pytest.param("kafka-vllm", marks=[KAFKA, VLLM])]
)
async def plant(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> AsyncIterator[Stack]:
    """Two agents; on Kafka with the library on a Milvus server, and the model in Triton or in vLLM; else embedded."""
    settings = {"REDIS_URL": redis_url, "MAX_IN_FLIGHT": "8"}
    if request.param == "embedded":
        async with stack(tmp_path, settings, per_category=EVENTS // 4, agents=2) as made:
            yield made
        return
    if request.param == "kafka-vllm":
        settings["ENGINE"] = "vllm"
    else:
        settings |= {"ENGINE_HOST": "triton", "TRITON_URL": request.getfixturevalue("triton")}
    # A broker of its own: its topics hold this plant's events and no other's.
    with milvus() as uri, kafka() as broker:
        settings |= {"MILVUS_URI": uri, "KAFKA_BOOTSTRAP_SERVERS": broker.address}
        async with stack(tmp_path, settings, per_category=EVENTS // 4, agents=2) as made:
            yield made


async def publish_broken(plant: Stack) -> set[str]:
    """An event whose image is no image, one whose image is gone, one that is no protobuf; the reasons to expect."""
    broken, gone = plant.folder / "broken.png", plant.folder / "gone.png"
    Image.new("RGB", (64, 64), "teal").save(gone)
    reference = plant.images.describe(gone)
    gone.unlink()
    broken.write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    wrong = pb.ImageReference(
        uri=broken.as_uri(),
        sha256=hashlib.sha256(broken.read_bytes()).hexdigest(),
        media_type="image/png",
        width=9,
        height=9,
    )
    for event_id, image in [("broken image", wrong), ("missing file", reference)]:
        captured = events_pb2.ImageCaptured(event_id=event_id, line="L1", category="brushed_metal", image=image)
        await publish(plant, event_id, captured.SerializeToString())
    await publish(plant, "no protobuf", b"\xff\xff\xff")
    return {"broken.png", "gone.png", "not an agentiad.v1.ImageCaptured"}


async def publish(plant: Stack, event_id: str, body: bytes, line: str = "L1") -> None:
    headers = cloudevents.headers(event_id, online.CAPTURED_TYPE, SOURCE, datetime.now(UTC))
    await plant.bus.publish(topics.IMAGES, line, body, headers)


@pytest.mark.timeout(600)
async def test_each_event_gets_exactly_one_verdict(plant: Stack) -> None:
    parts = plant.parts[:EVENTS]
    published = await asyncio.gather(
        *(
            publish_image(plant.bus, plant.images, part.image, LINES[i % len(LINES)], part.category)
            for i, part in enumerate(parts)
        )
    )
    reasons = await publish_broken(plant)
    twice = published[7]
    await publish(plant, twice.event_id, twice.SerializeToString())

    before = await plant.inspections(EVENTS // 5)
    os.kill(plant.agents[0].process.pid, signal.SIGKILL)
    assert len({inspection.event_id for inspection in before}) < EVENTS, "nothing was left to do at the kill"

    expected = {captured.event_id for captured in published}
    inspections = await plant.inspections(len(expected))
    letters = await plant.dead_letters(3)

    by_event = defaultdict(set)
    for inspection in inspections:
        by_event[inspection.event_id].add(inspection.SerializeToString(deterministic=True))
    assert set(by_event) == expected
    assert all(len(copies) == 1 for copies in by_event.values())
    for inspection in inspections:
        assert inspection.decision in (events_pb2.DECISION_PASS, events_pb2.DECISION_REJECT)
        assert inspection.HasField("raw_score")
        assert inspection.trajectory.turns
    told = [" ".join(letter.headers.values()) for letter in letters]
    assert len(letters) == 3
    assert all(any(reason in text for text in told) for reason in reasons), told
    await assert_all_is_committed(plant)


async def assert_all_is_committed(plant: Stack) -> None:
    """After the agents have gone, the group goes on with what is published from now on, and with nothing before it."""
    plant.agents[1].process.terminate()
    assert await plant.agents[1].process.wait() == 0
    marks = {f"mark {line}" for line in LINES}
    for line in LINES:
        await publish(plant, f"mark {line}", b"", line)
    stop = asyncio.Event()
    seen: list[str] = []

    async def handle(event: Event) -> None:
        seen.append(cloudevents.parse(event.headers).event_id)
        if marks <= set(seen):
            stop.set()

    await plant.bus.consume([topics.IMAGES], online.GROUP, handle, max_in_flight=1, stop=stop)
    assert set(seen) == marks
