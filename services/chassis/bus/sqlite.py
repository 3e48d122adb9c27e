"""The embedded bus: a durable SQLite log for one machine and several processes. Same contract as Kafka, no broker.

Nothing tells a process that another one wrote to the file, so waiting is polling: a publish through the same bus wakes
its readers at once; for other processes the pause doubles from 2 ms to 50 ms while nothing comes. 50 ms is short beside
an inspection, and twenty rounds of index look-ups a second cost well under 1 % of a core.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from services.chassis.bus import Event, Handler, check_offsets, check_size
from services.chassis.bus.delivery import Delivery
from services.chassis.bus.dispatcher import Source
from services.chassis.bus.failures import Record, RetryPolicy
from services.chassis.bus.sqlite_log import SqliteLog
from services.chassis.bus.sqlite_member import MAX_PAUSE_S, MIN_PAUSE_S, Member
from services.chassis.topics import TopicSpec, retry, with_failures

READ_LIMIT = 500


class SqliteBus:
    """lease_s: a member that has not beaten for so long is dead and its partitions go to the others. grace_s: how long
    handlers under way may go on when their partition moves away or consume() is stopped; must be well below lease_s."""

    def __init__(
        self, path: Path, *, retry_policy: RetryPolicy | None = None, lease_s: float = 15.0, grace_s: float = 5.0
    ) -> None:
        self._path = path
        self._policy = retry_policy or RetryPolicy()
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._thread = ThreadPoolExecutor(1, "sqlite-bus")  # one connection, used by one thread
        self._log: SqliteLog | None = None
        self._partitions: dict[str, int] = {}
        self._pending: list[tuple[Record, int, asyncio.Future[None]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._wakers: set[Callable[[], None]] = set()

    async def publish(self, topic: str, key: str, value: bytes, headers: Mapping[str, str]) -> None:
        check_size(key, value, headers)
        await self._send(Record(topic, key, value, dict(headers)))

    async def consume(
        self, topics: Sequence[str], group: str, handler: Handler, *, max_in_flight: int, stop: asyncio.Event
    ) -> None:
        for topic in (*topics, *map(retry, topics)):
            await self._count(topic)
        delivery = Delivery(handler, group, self._policy, self._send)
        member = Member(
            self._call, topics, group, delivery, max_in_flight, lease_s=self._lease_s, grace_s=self._grace_s
        )
        self._wakers.add(member.wake)
        try:
            await member.run(stop)
        finally:
            self._wakers.discard(member.wake)

    async def read(
        self,
        topic: str,
        *,
        from_beginning: bool,
        stop: asyncio.Event,
        caught_up: asyncio.Event | None = None,
        offsets: Mapping[int, int] | None = None,
    ) -> AsyncGenerator[Event, None]:
        sources = [Source(topic, partition) for partition in range(await self._count(topic))]
        ends = {source.partition: await self._call(SqliteLog.end, source) for source in sources}
        check_offsets(topic, offsets or {}, ends)
        starts = (dict.fromkeys(ends, 0) if from_beginning else ends) | dict(offsets or {})
        positions = {source: starts[source.partition] for source in sources}
        published = asyncio.Event()
        self._wakers.add(published.set)
        pause_s = MIN_PAUSE_S
        try:
            while not stop.is_set():
                published.clear()
                batches: dict[Source, Any] = await self._call(SqliteLog.fetch, positions, READ_LIMIT)
                for source, rows in batches.items():
                    for row in rows:
                        yield Event(topic, row.key, row.value, row.headers, source.partition, row.offset)
                    del positions[source]
                    positions[source] = rows[-1].offset + 1
                pause_s = MIN_PAUSE_S if batches else min(2 * pause_s, MAX_PAUSE_S)
                if not batches:
                    if caught_up is not None:
                        caught_up.set()
                    await _wait(published, pause_s)
        finally:
            self._wakers.discard(published.set)

    async def ensure_topics(self, topics: Mapping[str, TopicSpec]) -> None:
        await self._call(SqliteLog.create, {name: spec.partitions for name, spec in with_failures(topics).items()})

    async def close(self) -> None:
        if self._writer:
            await self._writer
        if self._log:
            await self._call(SqliteLog.close)
        self._thread.shutdown()

    async def _send(self, record: Record) -> None:
        partitions = await self._count(record.topic)
        written = asyncio.get_running_loop().create_future()
        self._pending.append((record, partitions, written))
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await written

    async def _write(self) -> None:
        """Write what is pending; what comes meanwhile shares the next transaction, and its one fsync."""
        while self._pending:
            batch, self._pending = self._pending, []
            try:
                await self._call(SqliteLog.append, [(record, partitions) for record, partitions, _ in batch])
            except Exception as error:
                _settle(batch, error)
            else:
                _settle(batch, None)
                for wake in self._wakers:
                    wake()

    async def _count(self, topic: str) -> int:
        """Partitions of the topic; LookupError if there is none."""
        if topic not in self._partitions:
            count = await self._call(SqliteLog.partitions, topic)
            if count is None:
                raise LookupError(f"topic {topic} does not exist in {self._path}: create it with ensure_topics")
            self._partitions[topic] = count
        return self._partitions[topic]

    async def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Run a method of the log in the log's thread."""

        def work() -> Any:
            self._log = self._log or SqliteLog(self._path)
            return method(self._log, *args)

        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _settle(batch: list[tuple[Record, int, asyncio.Future[None]]], error: Exception | None) -> None:
    for _, _, written in batch:
        if written.done():  # its publisher was cancelled
            continue
        if error is None:
            written.set_result(None)
        else:
            written.set_exception(error)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return
