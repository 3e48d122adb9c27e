"""The two kinds of bus for the contract tests, and what the tests need around them."""

import asyncio
import sqlite3
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path

from kafka import KafkaAdminClient, KafkaProducer, TopicPartition

from agentiad.v1.events_pb2 import ImageCaptured
from services.chassis.bus import Bus, Event, Handler
from services.chassis.bus.failures import Record, RetryPolicy
from services.chassis.bus.kafka import KafkaBus
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.bus.sqlite_log import SqliteLog
from services.chassis.topics import TopicSpec

# As the real one, but fast: two calls in place, a retry after 0.3 s and 0.6 s, a dead letter after six calls.
FAST = RetryPolicy(in_place=2, back_off_s=0.02, retry_delay_s=0.3, max_attempts=6)
PATIENCE_S = 60.0


@dataclass
class Store:
    """Where events lie; each bus() is a client of it as another process would have."""

    kind: str
    place: str
    made: list[Bus] = field(default_factory=list)

    def bus(self, *, grace_s: float = 5.0) -> Bus:
        bus = make_bus(self.kind, self.place, grace_s=grace_s)
        self.made.append(bus)
        return bus

    async def topic(self, partitions: int = 3) -> str:
        """A new topic with its retry and dead-letter topics."""
        name = f"test-{uuid.uuid4().hex}"
        await self.bus().ensure_topics({name: TopicSpec(partitions, False, ImageCaptured)})
        return name

    def append(self, topic: str, key: str, value: bytes) -> None:
        """As someone publishes who does not use our bus: nothing is checked."""
        if self.kind == "kafka":
            with KafkaProducer(bootstrap_servers=self.place, max_request_size=2**21) as producer:
                producer.send(topic, value, key.encode()).get(PATIENCE_S)
        else:
            log = SqliteLog(Path(self.place))
            log.append([(Record(topic, key, value, {}), log.partitions(topic) or 0)])
            log.close()

    def remove(self, topic: str, partition: int, before: int) -> None:
        """As retention does: the partition's events below the offset `before` are gone."""
        if self.kind == "kafka":
            with KafkaAdminClient(bootstrap_servers=self.place) as admin:
                admin.delete_records({TopicPartition(topic, partition): before})
        else:
            with closing(sqlite3.connect(self.place)) as db, db:
                where = "topic = ? AND partition = ? AND offset < ?"
                db.execute(f"DELETE FROM log WHERE {where}", (topic, partition, before))


def make_bus(kind: str, place: str, *, grace_s: float = 5.0) -> Bus:
    if kind == "kafka":
        return KafkaBus(place, retry_policy=FAST, session_timeout_s=3.0, grace_s=grace_s)
    return SqliteBus(Path(place), retry_policy=FAST, lease_s=2.0, grace_s=grace_s)


class Collector:
    """A handler that keeps what it is given, and can be waited for. beside: another one, to be waited for together."""

    def __init__(self, beside: "Collector | None" = None) -> None:
        self.events: list[Event] = []
        self._changed: asyncio.Condition = beside._changed if beside else asyncio.Condition()

    async def __call__(self, event: Event) -> None:
        self.events.append(event)
        async with self._changed:
            self._changed.notify_all()

    @property
    def values(self) -> list[bytes]:
        return [event.value for event in self.events]

    async def until(self, condition: Callable[[list[Event]], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S), self._changed:
            await self._changed.wait_for(lambda: condition(self.events))

    async def count(self, number: int) -> list[Event]:
        await self.until(lambda events: len(events) >= number)
        return self.events


@asynccontextmanager
async def consuming(
    bus: Bus, topic: str, handler: Handler, *, group: str = "g", max_in_flight: int = 8
) -> AsyncIterator["asyncio.Task[None]"]:
    """consume() goes on until the block ends; a handler's bug is raised at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(bus.consume([topic], group, handler, max_in_flight=max_in_flight, stop=stop))
    try:
        yield task
    finally:
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await task


async def read(bus: Bus, topic: str, number: int) -> list[Event]:
    """The first events of the topic, as they lie in it."""
    events: list[Event] = []
    async with asyncio.timeout(PATIENCE_S), aclosing(bus.read(topic, from_beginning=True, stop=asyncio.Event())) as log:
        async for event in log:
            events.append(event)
            if len(events) == number:
                break
    return events


async def read_all(
    bus: Bus, topic: str, *, from_beginning: bool = True, offsets: Mapping[int, int] | None = None
) -> list[Event]:
    """What read() hands out until it has caught up."""
    done = asyncio.Event()
    async with asyncio.timeout(PATIENCE_S):
        log = bus.read(topic, from_beginning=from_beginning, stop=done, caught_up=done, offsets=offsets)
        return [event async for event in log]


async def publish(bus: Bus, topic: str, *values: str, key: str = "k") -> None:
    """One after another, so that their order is known."""
    for value in values:
        await bus.publish(topic, key, value.encode(), {})
