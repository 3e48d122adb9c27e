"""One consume() on the embedded bus: a member of its group, from its first heartbeat to its leaving."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from services.chassis.bus import Event
from services.chassis.bus.delivery import Delivery
from services.chassis.bus.dispatcher import Dispatcher, Source
from services.chassis.bus.sqlite_log import SqliteLog
from services.chassis.topics import retry

BEATS_PER_LEASE = 5  # a beat may come four times too late before the member counts as dead
COMMIT_INTERVAL_S = 0.2
MIN_PAUSE_S, MAX_PAUSE_S = 0.002, 0.05

Call = Callable[..., Awaitable[Any]]


class Member:
    """call: runs a method of the log in the log's thread. grace_s must be well below lease_s: a member that waits for
    its handlers does not beat."""

    def __init__(
        self,
        call: Call,
        topics: Sequence[str],
        group: str,
        delivery: Delivery,
        max_in_flight: int,
        *,
        lease_s: float,
        grace_s: float,
    ) -> None:
        self._call = call
        self._topics = [*topics, *map(retry, topics)]
        self._group = group
        self._name = uuid.uuid4().hex
        self._delivery = delivery
        self._dispatcher = Dispatcher(delivery.deliver, max_in_flight)
        self._lease_s = lease_s
        self._grace_s = grace_s
        self._positions: dict[Source, int] = {}  # what to fetch next of the partitions that this member owns
        self._next_beat = self._next_commit = 0.0

    def wake(self) -> None:
        """Something was published: look now."""
        self._dispatcher.wake()

    async def run(self, stop: asyncio.Event) -> None:
        pause_s = MIN_PAUSE_S
        grace_s = 0.0
        try:
            while not stop.is_set() and self._dispatcher.failure is None:
                await self._keep_up()
                found = await self._fetch()
                pause_s = MIN_PAUSE_S if found else min(2 * pause_s, MAX_PAUSE_S)
                if not found:
                    await self._dispatcher.wait(pause_s)
            grace_s = self._grace_s if self._dispatcher.failure is None else 0.0
        finally:
            await self._dispatcher.stop(grace_s)
            await self._call(SqliteLog.commit, self._group, self._name, self._dispatcher.uncommitted())
            await self._call(SqliteLog.leave, self._group, self._name)
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure

    async def _keep_up(self) -> None:
        now = time.monotonic()
        if now >= self._next_beat:
            self._next_beat = now + self._lease_s / BEATS_PER_LEASE
            await self._beat()
        if now >= self._next_commit:
            self._next_commit = now + COMMIT_INTERVAL_S
            await self._commit(self._dispatcher.uncommitted())

    async def _beat(self) -> None:
        owned, surplus = await self._call(SqliteLog.beat, self._group, self._name, self._topics, self._lease_s)
        lost = self._positions.keys() - owned.keys()
        self._dispatcher.forget(lost)
        self._positions = {source: self._positions.get(source, position) for source, position in owned.items()}
        if surplus:
            for source in surplus:
                del self._positions[source]
            positions = await self._dispatcher.revoke(surplus, self._grace_s)
            await self._call(SqliteLog.commit, self._group, self._name, positions, surplus)

    async def _commit(self, positions: dict[Source, int]) -> None:
        if positions:
            await self._call(SqliteLog.commit, self._group, self._name, positions)
            self._dispatcher.committed(positions)

    async def _fetch(self) -> bool:
        """Offer the next events of all partitions; whether there were any."""
        held = set(self._dispatcher.held)
        wanted = {source: position for source, position in self._positions.items() if source not in held}
        room = self._dispatcher.room
        if not room or not wanted:
            return False
        batches = await self._call(SqliteLog.fetch, wanted, room)
        for source, rows in batches.items():
            for row in rows:
                self._delivery.take(
                    self._dispatcher, Event(source.topic, row.key, row.value, row.headers, source.partition, row.offset)
                )
            # Served last next time: a busy partition must not starve the others.
            del self._positions[source]
            self._positions[source] = rows[-1].offset + 1
        self._dispatcher.start()
        return bool(batches)
