"""The ends of the bus around a reward worker: what an agent publishes, what a trainer reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime

from redis.asyncio import Redis

from agentiad.v1 import events_pb2
from services.chassis import topics
from services.chassis.bus import Bus, Event, cloudevents
from services.reward import groups, worker
from services.reward.records import Records
from tests.chassis.bus.stores import PATIENCE_S


@asynccontextmanager
async def working(bus: Bus, redis_url: str) -> AsyncIterator[asyncio.Task[None]]:
    """A worker until the block ends; what it raises is raised at the end."""
    stop = asyncio.Event()
    async with Redis.from_url(redis_url) as redis:
        task = asyncio.create_task(worker.run(bus, Records(redis), max_in_flight=8, stop=stop))
        try:
            yield task
        finally:
            stop.set()
            async with asyncio.timeout(PATIENCE_S):
                await task


async def publish(bus: Bus, *members: events_pb2.TrajectoryCompleted) -> None:
    """One after another, each with a traceparent of its own."""
    for member in members:
        await publish_body(bus, member.group_id, member.SerializeToString(), trace_of(member))


async def publish_body(bus: Bus, key: str, body: bytes, traceparent: str = "", type_name: str = "") -> None:
    headers = cloudevents.headers(
        "e", type_name or worker.COMPLETED_TYPE, "/agentiad/agent", datetime.now(UTC), traceparent
    )
    await bus.publish(topics.TRAJECTORIES, key, body, headers)


def trace_of(member: events_pb2.TrajectoryCompleted) -> str:
    return f"00-{member.group_id}-{member.member}"


def expected(members: Collection[events_pb2.TrajectoryCompleted]) -> list[bytes]:
    """The bodies of a group's scored trajectories."""
    scored = groups.score_group([member.SerializeToString() for member in members])
    return [each.SerializeToString(deterministic=True) for each in scored]


async def read(bus: Bus, topic: str, keys: Collection[str], number: int) -> list[Event]:
    """The first `number` events with one of the keys, as they lie in the topic."""
    found: list[Event] = []
    async with asyncio.timeout(PATIENCE_S), aclosing(bus.read(topic, from_beginning=True, stop=asyncio.Event())) as log:
        async for event in log:
            if event.key in keys:
                found.append(event)
            if len(found) == number:
                return found
    raise AssertionError("the topic ended")


def by_id(events: Collection[Event]) -> list[Event]:
    """By group and member."""
    return sorted(events, key=lambda event: event.headers["ce_id"])
