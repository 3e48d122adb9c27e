"""One consume() on Kafka: a member of its group, from joining to leaving.

kafka-python's consumer belongs to one thread; the loop awaits its calls one after another, so everything else
(dispatch, watermarks) stays on the loop and needs no lock. Events are handed over a poll at a time.

Pause-and-poll: while there is no room for more events, every partition is paused and poll() is called all the same,
because a member that does not poll for max.poll.interval loses its partitions.

Rebalance (cooperative): partitions that move away are first brought to rest (what waits is dropped, what runs gets a
grace), then committed, and only then does this member let them go: the listener is awaited before the group's second
round.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from kafka import AsyncConsumerRebalanceListener, KafkaConsumer, TopicPartition
from kafka.errors import KafkaError, RetriableError
from kafka.future import Future
from kafka.structs import OffsetAndMetadata

from services.chassis.bus import Event
from services.chassis.bus.delivery import Delivery
from services.chassis.bus.dispatcher import PREFETCH, Dispatcher, Source
from services.chassis.bus.kafka_assignor import PerTopicStickyAssignor
from services.chassis.errors import Transient
from services.chassis.telemetry import log
from services.chassis.topics import retry

POLL_S = 0.2  # also how late a stop may be noticed
PAUSED_POLL_S = 1.0  # far below any max.poll.interval; a rebalance waits so long for a member that is full
COMMIT_INTERVAL_S = 0.5
CLOSE_DEADLINE_S = 5.0

T = TypeVar("T")


class Member:
    """config: KafkaConsumer's, with the group."""

    def __init__(
        self,
        config: Mapping[str, Any],
        topics: Sequence[str],
        delivery: Delivery,
        max_in_flight: int,
        *,
        grace_s: float,
    ) -> None:
        self._config = config
        self._topics = [*topics, *map(retry, topics)]
        self._delivery = delivery
        self._dispatcher = Dispatcher(delivery.deliver, max_in_flight)
        self._grace_s = grace_s
        self.loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, "kafka-consumer")
        self._next_commit = 0.0
        self._commit_failed = False
        self._joining = False

    async def run(self, stop: asyncio.Event) -> None:
        consumer = await self._call(self._join)
        grace_s = 0.0
        try:
            while not stop.is_set() and self._dispatcher.failure is None:
                await self._turn(consumer)
            grace_s = self._grace_s if self._dispatcher.failure is None else 0.0
        finally:
            await self._dispatcher.stop(grace_s)
            positions = self._dispatcher.uncommitted()
            self._dispatcher.committed(positions)
            await self._call(self._leave, consumer, positions)
            self._thread.shutdown(wait=False)
        if self._dispatcher.failure is not None:
            raise self._dispatcher.failure

    async def _turn(self, consumer: KafkaConsumer) -> None:
        if not self._dispatcher.room and not self._joining:
            await self._dispatcher.wait(PAUSED_POLL_S)
        room = self._dispatcher.room
        held = set(self._dispatcher.held)
        batches = await self._call(self._poll, consumer, held, room, self._due_commits())
        for records in batches.values():
            for record in records:
                self._delivery.take(self._dispatcher, to_event(record))
        self._dispatcher.start()

    async def revoke(self, sources: Iterable[Source]) -> dict[Source, int]:
        """For the listener: bring these partitions to rest; what to commit of them."""
        return await self._dispatcher.revoke(sources, self._grace_s)

    async def lose(self, sources: Iterable[Source]) -> None:
        """For the listener: they are another member's already."""
        self._dispatcher.forget(sources)

    def _due_commits(self) -> dict[Source, int]:
        now = self.loop.time()
        if now < self._next_commit:
            return {}
        self._next_commit = now + COMMIT_INTERVAL_S
        if self._commit_failed:
            self._commit_failed = False
            self._dispatcher.forget_committed()
        positions = self._dispatcher.uncommitted()
        self._dispatcher.committed(positions)  # unless _committed says otherwise
        return positions

    async def _call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Run it in the consumer's thread; there is only one, so calls never overlap, whatever is cancelled here."""
        return await self.loop.run_in_executor(self._thread, partial(method, *args))

    def _join(self) -> KafkaConsumer:
        try:
            consumer = KafkaConsumer(
                **self._config,
                enable_auto_commit=False,
                auto_offset_reset="earliest",
                allow_auto_create_topics=False,
                isolation_level="read_committed",  # a plant may publish in transactions
                max_poll_records=PREFETCH,
                partition_assignment_strategy=[PerTopicStickyAssignor()],
            )
        except KafkaError as error:
            raise Transient(f"no answer from Kafka: {error!r}") from error
        if missing := set(self._topics) - consumer.topics():
            consumer.close(autocommit=False)
            raise LookupError(f"topics {', '.join(sorted(missing))} do not exist: create them with ensure_topics")
        consumer.subscribe(self._topics, listener=_Listener(self, consumer))
        return consumer

    def _poll(
        self, consumer: KafkaConsumer, held: set[Source], room: int, positions: dict[Source, int]
    ) -> dict[TopicPartition, list[Any]]:
        if positions:
            consumer.commit_async(to_offsets(positions), callback=self._committed)
        assigned = consumer.assignment()
        to_pause = {partition for partition in assigned if not room or Source(*partition) in held}
        paused = consumer.paused()
        consumer.resume(*(paused - to_pause))
        consumer.pause(*(to_pause - paused))
        if _is_joining(consumer):
            consumer._coordinator.request_rejoin()
        try:
            batches: dict[TopicPartition, list[Any]] = consumer.poll(int(POLL_S * 1000), max_records=room or 1)
        except RetriableError as error:
            # The client mends its connections itself; a broker that stays away is seen in the log, and in the lag.
            log.warning("poll failed", error=repr(error))
            return {}
        finally:
            self._joining = _is_joining(consumer)
        return batches

    def _committed(self, _offsets: Any, result: Any) -> None:
        """In the consumer's thread, some polls after the commit."""
        if isinstance(result, Exception):
            log.info("commit failed; it will be repeated", error=repr(result))
            self._commit_failed = True

    def _leave(self, consumer: KafkaConsumer, positions: dict[Source, int]) -> None:
        try:
            if positions:
                consumer.commit(to_offsets(positions), timeout_ms=CLOSE_DEADLINE_S * 1000)
        except KafkaError as error:
            log.warning("last commit failed; events will come again", error=repr(error))
        consumer.close(autocommit=False, timeout_ms=CLOSE_DEADLINE_S * 1000)


class _Listener(AsyncConsumerRebalanceListener):  # type: ignore[misc]
    """Runs on kafka-python's own I/O loop, whose futures are all that may be awaited here. While it waits, heartbeats
    go on."""

    def __init__(self, member: Member, consumer: KafkaConsumer) -> None:
        self._member = member
        self._consumer = consumer

    async def on_partitions_assigned(self, assigned: set[TopicPartition]) -> None:
        log.info("partitions assigned", partitions=sorted(assigned))

    async def on_partitions_revoked(self, revoked: set[TopicPartition]) -> None:
        log.info("partitions revoked", partitions=sorted(revoked))
        positions = await self._on_loop(self._member.revoke([Source(*partition) for partition in revoked]))
        try:
            await self._consumer.commit_async(to_offsets(positions))
        except KafkaError as error:
            log.warning("commit on revoke failed; events will come again", error=repr(error))

    async def on_partitions_lost(self, lost: set[TopicPartition]) -> None:
        log.warning("partitions lost", partitions=sorted(lost))
        await self._on_loop(self._member.lose([Source(*partition) for partition in lost]))

    def _on_loop(self, coroutine: Coroutine[Any, Any, T]) -> Future:
        """Run it on our loop; the result as a kafka-python future, resolved on kafka-python's loop."""
        done = Future()

        def settle(outcome: concurrent.futures.Future[T]) -> None:
            self._consumer._net.call_soon_threadsafe(lambda: done.success(outcome.result()))

        asyncio.run_coroutine_threadsafe(coroutine, self._member.loop).add_done_callback(settle)
        return done


def _is_joining(consumer: KafkaConsumer) -> bool:
    """Whether a poll timed out while the member was (re)joining its group.

    kafka-python 3.0.12 forgets such a join if changed metadata caused it (new partitions, or a first join before the
    topics are known): the next poll finds nothing to do, no heartbeat is sent, and the member hangs for ever. Asking
    for the rejoin again makes the next poll wait for the join under way. Java's client had the same bug (KAFKA-9815)
    and the same cure."""
    return consumer._coordinator._join_task is not None


def to_offsets(positions: Mapping[Source, int]) -> dict[TopicPartition, OffsetAndMetadata]:
    return {TopicPartition(*source): OffsetAndMetadata(position, "", -1) for source, position in positions.items()}


def to_event(record: Any) -> Event:
    """A kafka-python ConsumerRecord as it lies in its topic."""
    headers = {name: decode(value) for name, value in record.headers}
    return Event(record.topic, decode(record.key), record.value or b"", headers, record.partition, record.offset)


def decode(data: bytes | None) -> str:
    return (data or b"").decode("utf-8", "surrogateescape")
