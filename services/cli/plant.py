"""`agentiad publish` and `agentiad watch`: the plant's two ends of the bus."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path

from agentiad.v1 import events_pb2
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents, make_bus
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.chassis.settings import BusSettings, load
from services.cli.inspect import console, make_progress
from services.cli.inspecting import find_images
from services.cli.rows import COLOURS, row

SOURCE = "/agentiad/plant"
# Events on their way to the broker at once.
AT_ONCE = 64


def publish(directory: Path, line: str, category: str, budget_s: float | None) -> int:
    """Publishes an event a picture; the exit status is 1 if any could not be described."""
    telemetry.configure("plant", "WARNING")
    return asyncio.run(_publish(directory, line, category, budget_s))


async def _publish(directory: Path, line: str, category: str, budget_s: float | None) -> int:
    files = find_images([directory])
    store = ImageStore([str(directory.resolve() if directory.is_dir() else directory.resolve().parent)])
    bus = make_bus(load(BusSettings))
    places = asyncio.Semaphore(AT_ONCE)
    failed = 0
    try:
        await bus.ensure_topics(topics.TOPICS)
        with make_progress(f"Publishing to {topics.IMAGES}", len(files)) as progress:

            async def one(file: Path) -> None:
                nonlocal failed
                async with places:
                    try:
                        await publish_image(bus, store, file, line, category, budget_s)
                    except BadInput as error:
                        failed += 1
                        console.print(f"[red]{error}[/red]")
                progress.advance(progress.task_ids[0])

            await asyncio.gather(*map(one, files))
    finally:
        await bus.close()
    console.print(f"{len(files) - failed} events published for line {line}")
    return 1 if failed or not files else 0


async def publish_image(
    bus: Bus, store: ImageStore, file: Path, line: str, category: str, budget_s: float | None = None
) -> events_pb2.ImageCaptured:
    """Publishes the event of one picture and returns it. Raises BadInput for a file that is no usable picture."""
    now = datetime.now(UTC)
    captured = events_pb2.ImageCaptured(
        event_id=uuid.uuid4().hex, line=line, category=category, unit=file.stem[:200],
        image=await asyncio.to_thread(store.describe, file),
    )  # fmt: skip
    captured.captured_at.FromDatetime(now)
    if budget_s is not None:
        captured.latency_budget.FromTimedelta(timedelta(seconds=budget_s))
    headers = cloudevents.headers(captured.event_id, captured.DESCRIPTOR.full_name, SOURCE, now)
    await bus.publish(topics.IMAGES, line, captured.SerializeToString(), headers)
    return captured


def watch(from_beginning: bool, as_json: bool, count: int | None) -> None:
    """Prints each event's verdict once, until Ctrl-C or `count` of them."""
    telemetry.configure("watch", "WARNING")
    try:
        asyncio.run(_watch(from_beginning, as_json, count))
    except KeyboardInterrupt:
        console.print("[dim]stopped[/dim]")


async def _watch(from_beginning: bool, as_json: bool, count: int | None) -> None:
    bus = make_bus(load(BusSettings))
    try:
        await bus.ensure_topics(topics.TOPICS)
        events = bus.read(topics.INSPECTIONS, from_beginning=from_beginning, stop=asyncio.Event())
        shown = 0
        async with aclosing(first_of_each(events)) as inspections:  # type: ignore[type-var]
            async for inspection in inspections:
                _print(inspection, as_json)
                shown += 1
                if shown == count:
                    return
    finally:
        await bus.close()


async def first_of_each(events: AsyncIterator[Event]) -> AsyncIterator[events_pb2.InspectionCompleted]:
    """Copies of an inspection are equal; the first of each event id is the verdict."""
    seen = set()
    async for event in events:
        inspection = events_pb2.InspectionCompleted.FromString(event.value)
        if inspection.event_id not in seen:
            seen.add(inspection.event_id)
            yield inspection


def _print(inspection: events_pb2.InspectionCompleted, as_json: bool) -> None:
    printed = row(inspection.trajectory.task.image.reference.uri, inspection, None)
    printed |= {"event_id": inspection.event_id, "line": inspection.line}
    if as_json:
        print(json.dumps(printed), flush=True)
        return
    score = "  –  " if printed["score"] is None else f"{printed['score']:.3f}"
    latency = inspection.latency.ToTimedelta().total_seconds()
    console.print(
        f"{inspection.line}  [{COLOURS[printed['decision']]}]{printed['decision']:6}[/]  {score}  "
        f"{printed['type']:14.14}  {latency:7.2f} s  {Path(printed['image']).name}",
        highlight=False,
    )
