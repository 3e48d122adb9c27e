"""What `agentiad watch` shows, on the embedded bus."""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path

import pytest
from PIL import Image

from agentiad.v1 import events_pb2
from services.chassis import topics
from services.chassis.bus import Bus, Event, cloudevents
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.cli import plant
from tests.cli.commands import agentiad

REASON = "outside the [image]\nroots"


async def publish(bus: Bus, topic: str, body: bytes) -> None:
    headers = cloudevents.headers("no protobuf", "agentiad.v1.ImageCaptured", plant.SOURCE, datetime.now(UTC))
    await bus.publish(topic, "L1", body, headers)


async def lay_aside(bus: Bus, count: int) -> None:
    """Ends when so many image events are dead letters."""
    stop = asyncio.Event()

    async def refuse(event: Event) -> None:
        raise BadInput(REASON)

    consuming = asyncio.create_task(bus.consume([topics.IMAGES], "g", refuse, max_in_flight=1, stop=stop))
    async with aclosing(bus.read(topics.dlq(topics.IMAGES), from_beginning=True, stop=stop)) as dead:
        for _ in range(count):
            await anext(dead)
    stop.set()
    await consuming


@pytest.fixture
async def bus(tmp_path: Path) -> Bus:
    """Two dead letters, one of a picture and one that is no protobuf; then one verdict, twice."""
    part = tmp_path / "part.png"
    Image.new("RGB", (8, 8)).save(part)
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(topics.TOPICS)
    await plant.publish_image(bus, ImageStore([str(tmp_path)]), part, "L1", "bolt")
    await publish(bus, topics.IMAGES, b"\xff\xff")
    await lay_aside(bus, 2)
    for _ in range(2):
        await publish(bus, topics.INSPECTIONS, events_pb2.InspectionCompleted(event_id="1").SerializeToString())
    return bus


async def test_verdicts_once_and_dead_letters_with_their_reason(bus: SqliteBus) -> None:
    verdicts, dead = [], []
    async with asyncio.timeout(30), aclosing(plant.results(bus, from_beginning=True)) as results:
        while len(verdicts) + len(dead) < 3:
            result = await anext(results)
            if isinstance(result, plant.DeadLetter):
                dead.append(result)
            else:
                verdicts.append(result.event_id)
    await bus.close()
    assert verdicts == ["1"]
    assert {(letter.line, letter.reason) for letter in dead} == {("L1", REASON)}
    assert {Path(letter.captured.image.uri).name for letter in dead} == {"part.png", ""}
    assert "no protobuf" in {letter.event_id for letter in dead}


def test_what_is_printed_of_a_dead_letter_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    image = events_pb2.ImageCaptured()
    image.image.uri = "file:///parts/part.png"
    letter = plant.DeadLetter("1", "L1", image, REASON)
    plant.print_dead(letter, as_json=False)
    plant.print_dead(letter, as_json=True)
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["L1  error   part.png: outside the [image] roots"]
    assert json.loads(printed.out) == {
        "image": "file:///parts/part.png", "error": REASON, "event_id": "1", "line": "L1",
    }  # fmt: skip


async def test_watch_ends_after_as_many_verdicts_as_asked_for(bus: SqliteBus, tmp_path: Path) -> None:
    await bus.close()
    watched = await asyncio.to_thread(
        agentiad, "watch", "--from-beginning", "--json", "--count", "1", "--data-dir", tmp_path, cwd=tmp_path
    )
    assert watched.returncode == 0, watched.stderr
    rows = [json.loads(line) for line in watched.stdout.splitlines()]
    assert [row["event_id"] for row in rows if "error" not in row] == ["1"]
