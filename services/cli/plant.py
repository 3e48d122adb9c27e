"""`agentiad publish` and `agentiad watch`: the plant's two ends of the bus."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from google.protobuf.message import DecodeError
from rich.markup import escape

from agentiad.v1 import events_pb2
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents, failures, make_bus
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.chassis.settings import BusSettings, load
from services.cli.inspect import console, make_progress
from services.cli.inspecting import find_images
from services.cli.rows import COLOURS, readable, row

SOURCE = "/agentiad/plant"
# Events on their way to the broker at once.
AT_ONCE = 64


def open_bus(data_dir: Path) -> Bus:
    """The one that the environment names: Kafka, or the embedded log in `data_dir`."""
    return make_bus(load(BusSettings).model_copy(update={"data_dir": data_dir}))


def bus_name(data_dir: Path) -> str:
    """Where that bus is, for a person."""
    return load(BusSettings).kafka_bootstrap_servers or str(data_dir / "bus.db")


def publish(directory: Path, line: str, category: str, budget_s: float | None, data_dir: Path) -> int:
    """Publishes an event a picture; the exit status is 1 if any could not be described."""
    telemetry.configure("plant", "WARNING")
    return asyncio.run(_publish(directory, line, category, budget_s, data_dir))


async def _publish(directory: Path, line: str, category: str, budget_s: float | None, data_dir: Path) -> int:
    files = find_images([directory])
    store = ImageStore([str(directory.resolve() if directory.is_dir() else directory.resolve().parent)])
    bus = open_bus(data_dir)
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
    console.print(f"{len(files) - failed} events published for line {line} to {bus_name(data_dir)}")
    return 1 if failed or not files else 0


async def publish_image(
    bus: Bus, store: ImageStore, file: Path, line: str, category: str, budget_s: float | None = None
) -> events_pb2.ImageCaptured:
    """Publishes the event of one picture and returns it. Raises BadInput for a file that is no usable picture."""
    now = datetime.now(UTC)
    captured = events_pb2.ImageCaptured(
        event_id=uuid.uuid4().hex, line=line, category=category, unit=readable(file.stem)[:200],
        image=await asyncio.to_thread(store.describe, file),
    )  # fmt: skip
    captured.captured_at.FromDatetime(now)
    if budget_s is not None:
        captured.latency_budget.FromTimedelta(timedelta(seconds=budget_s))
    headers = cloudevents.headers(captured.event_id, captured.DESCRIPTOR.full_name, SOURCE, now)
    await bus.publish(topics.IMAGES, line, captured.SerializeToString(), headers)
    return captured


def watch(from_beginning: bool, as_json: bool, count: int | None, data_dir: Path) -> None:
    """Prints each event's verdict once, and dead letters, until Ctrl-C or `count` verdicts."""
    telemetry.configure("watch", "WARNING")
    try:
        asyncio.run(_watch(from_beginning, as_json, count, data_dir))
    except KeyboardInterrupt:
        console.print("[dim]stopped[/dim]")


async def _watch(from_beginning: bool, as_json: bool, count: int | None, data_dir: Path) -> None:
    bus = open_bus(data_dir)
    try:
        await bus.ensure_topics(topics.TOPICS)
        console.print(f"[dim]Watching {bus_name(data_dir)}; Ctrl-C stops.[/dim]")
        shown = 0
        async with aclosing(results(bus, from_beginning)) as found:
            async for result in found:
                if isinstance(result, DeadLetter):
                    print_dead(result, as_json)
                    continue
                _print(result, as_json)
                shown += 1
                if shown == count:
                    return
    finally:
        await bus.close()


@dataclass(frozen=True)
class DeadLetter:
    """An image event that was laid aside, and why. `captured` is empty where it could not be read."""

    event_id: str
    line: str
    captured: events_pb2.ImageCaptured
    reason: str


async def results(bus: Bus, from_beginning: bool) -> AsyncGenerator[events_pb2.InspectionCompleted | DeadLetter, None]:
    """What became of the images. Copies of an inspection are equal; the first of each event id is the verdict."""
    stop = asyncio.Event()
    dead = topics.dlq(topics.IMAGES)
    logs = [bus.read(topic, from_beginning=from_beginning, stop=stop) for topic in (topics.INSPECTIONS, dead)]
    seen = set()
    async with aclosing(_merged(logs)) as events:
        async for event in events:
            if event.topic == dead:
                yield _dead_letter(event)
                continue
            inspection = events_pb2.InspectionCompleted.FromString(event.value)
            if inspection.event_id not in seen:
                seen.add(inspection.event_id)
                yield inspection


async def _merged(logs: Sequence[AsyncIterator[Event]]) -> AsyncGenerator[Event, None]:
    """The events of logs that never end, as they come."""
    waiting = {asyncio.ensure_future(anext(log)): log for log in logs}
    try:
        while True:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                log = waiting.pop(task)
                yield task.result()
                waiting[asyncio.ensure_future(anext(log))] = log
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for log in logs:
            await log.aclose()  # type: ignore[attr-defined]


def _dead_letter(event: Event) -> DeadLetter:
    try:
        captured = events_pb2.ImageCaptured.FromString(event.value)
    except DecodeError:
        captured = events_pb2.ImageCaptured()
    reason = event.headers.get(failures.REASON, "no reason is given")
    return DeadLetter(event.headers.get("ce_id", ""), captured.line or event.key, captured, reason)


def _print(inspection: events_pb2.InspectionCompleted, as_json: bool) -> None:
    printed = row(inspection.trajectory.task.image.reference.uri, inspection, None)
    printed |= {"event_id": inspection.event_id, "line": inspection.line}
    if as_json:
        print(json.dumps(printed), flush=True)
        return
    score = "  –  " if printed["score"] is None else f"{printed['score']:.3f}"
    latency = inspection.latency.ToTimedelta().total_seconds()
    unknown = "" if printed["category_known"] else "  [yellow](the policy was not trained on this category)[/yellow]"
    console.print(
        f"{inspection.line}  [{COLOURS[printed['decision']]}]{printed['decision']:6}[/]  {score}  "
        f"{printed['type']:14.14}  {latency:7.2f} s  {escape(Path(printed['image']).name)}{unknown}",
        highlight=False,
    )


def print_dead(letter: DeadLetter, as_json: bool) -> None:
    image = letter.captured.image.uri
    if as_json:
        printed = {"image": image, "error": letter.reason, "event_id": letter.event_id, "line": letter.line}
        print(json.dumps(printed), flush=True)
        return
    words = f"{Path(image).name or letter.event_id}: {' '.join(letter.reason.split())}"
    console.print(f"{escape(letter.line)}  [red]error[/]   {escape(words)}", highlight=False, soft_wrap=True)
