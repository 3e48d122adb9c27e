"""The bus on Apache Kafka, by kafka-python 3 (which has no asyncio: its calls run in threads of their own).

Publishing costs no thread hop per event: `send` only appends to the producer's buffer, and acknowledgements come back
to the loop in batches. Idempotent producer, acks=all: a retry inside the client never doubles or reorders events.
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer, TopicPartition
from kafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    NoError,
    RetriableError,
    TopicAlreadyExistsError,
    for_code,
)

from services.chassis.bus import Event, Handler, check_offsets, check_size
from services.chassis.bus.delivery import Delivery
from services.chassis.bus.failures import Record, RetryPolicy
from services.chassis.bus.kafka_member import Member, to_event
from services.chassis.errors import BadInput, Transient
from services.chassis.topics import TopicSpec, dlq, with_failures

# Kafka's clients measure best with a small linger: fewer, fuller requests, at 2 ms of latency.
LINGER_MS = 2
BATCH_BYTES = 128 * 1024
# A broker that restarts is back in seconds; longer than this and the publisher should hear of it.
PUBLISH_DEADLINE_S = 30.0
# kafka-python would wait up to 30 s between attempts, long after a restarted broker is back.
RECONNECT_MS = 1000
REQUEST_DEADLINE_S = 10.0
METADATA_DEADLINE_S = 5.0
READ_POLL_MS = 200
# Dead letters must outlive a plant's summer break; Kafka's default is a week.
DLQ_RETENTION_MS = 60 * 24 * 3600 * 1000


class KafkaBus:
    """servers: host:port[,host:port…]. group_instance_id: a name that outlives a restart of this process (a stateful
    pod's) makes it a static member: its partitions wait for it for the session timeout instead of moving twice.
    max_poll_interval_s, session_timeout_s: as Kafka's settings of these names. grace_s: how long handlers under way may
    go on when their partition moves away or consume() is stopped."""

    def __init__(
        self,
        servers: str,
        *,
        retry_policy: RetryPolicy | None = None,
        group_instance_id: str | None = None,
        max_poll_interval_s: float = 300.0,
        session_timeout_s: float = 45.0,
        grace_s: float = 5.0,
        publish_deadline_s: float = PUBLISH_DEADLINE_S,
    ) -> None:
        self._common = {
            "bootstrap_servers": servers.split(","),
            "reconnect_backoff_max_ms": RECONNECT_MS,
            "bootstrap_timeout_ms": int(publish_deadline_s * 1000),
        }
        self._policy = retry_policy or RetryPolicy()
        self._membership = {
            "group_instance_id": group_instance_id,
            "max_poll_interval_ms": int(max_poll_interval_s * 1000),
            "session_timeout_ms": int(session_timeout_s * 1000),
            "heartbeat_interval_ms": int(min(3.0, session_timeout_s / 3) * 1000),
        }
        self._grace_s = grace_s
        self._publish_deadline_s = publish_deadline_s
        self._producer: KafkaProducer | None = None
        self._starting = asyncio.Lock()
        self._known: set[str] = set()
        self._acknowledged: deque[tuple[asyncio.Future[None], BaseException | None]] = deque()
        self._draining = False

    async def publish(self, topic: str, key: str, value: bytes, headers: Mapping[str, str]) -> None:
        check_size(key, value, headers)
        await self._send(Record(topic, key, value, dict(headers)))

    async def consume(
        self, topics: Sequence[str], group: str, handler: Handler, *, max_in_flight: int, stop: asyncio.Event
    ) -> None:
        delivery = Delivery(handler, group, self._policy, self._send)
        config = self._common | self._membership | {"group_id": group}
        await Member(config, topics, delivery, max_in_flight, grace_s=self._grace_s).run(stop)

    async def read(
        self,
        topic: str,
        *,
        from_beginning: bool,
        stop: asyncio.Event,
        caught_up: asyncio.Event | None = None,
        offsets: Mapping[int, int] | None = None,
    ) -> AsyncGenerator[Event, None]:
        thread = ThreadPoolExecutor(1, "kafka-read")
        call = partial(asyncio.get_running_loop().run_in_executor, thread)
        consumer = await call(self._reader)
        try:
            await call(_assign, consumer, topic, from_beginning, offsets or {})
            ends = {} if caught_up is None else await call(_ends, consumer)
            while not stop.is_set():
                if caught_up is not None and not caught_up.is_set() and await call(_has_reached, consumer, ends):
                    caught_up.set()
                batches = await call(partial(consumer.poll, READ_POLL_MS))
                for records in batches.values():
                    for record in records:
                        yield to_event(record)
        finally:
            await asyncio.shield(call(consumer.close))
            thread.shutdown(wait=False)

    async def ensure_topics(self, topics: Mapping[str, TopicSpec]) -> None:
        await asyncio.to_thread(self._create, with_failures(topics))

    async def close(self) -> None:
        if self._producer is not None:
            await asyncio.to_thread(self._producer.close, self._publish_deadline_s)

    async def _send(self, record: Record) -> None:
        producer = await self._ready(record.topic)
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[None] = loop.create_future()
        headers = [(name, encode(text)) for name, text in record.headers.items()]
        try:
            sent = producer.send(record.topic, record.value, encode(record.key) or None, headers)
            sent.add_callback(self._acknowledge, loop, acknowledged, None)
            sent.add_errback(partial(self._acknowledge, loop, acknowledged))
            await acknowledged
        except MessageSizeTooLargeError as error:
            raise BadInput(f"{record.topic} does not take an event of this size: {error}") from error
        except KafkaError as error:
            raise Transient(f"Kafka did not take an event for {record.topic}: {error!r}") from error

    def _acknowledge(
        self, loop: asyncio.AbstractEventLoop, waiter: "asyncio.Future[None]", error: BaseException | None, *_: Any
    ) -> None:
        """In the producer's thread. One wake-up of the loop serves all acknowledgements of a batch."""
        self._acknowledged.append((waiter, error))
        if not self._draining:
            self._draining = True
            loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = False  # before the first popleft: what is appended from now on wakes the loop again
        while self._acknowledged:
            waiter, error = self._acknowledged.popleft()
            if waiter.done():
                continue
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

    async def _ready(self, topic: str) -> KafkaProducer:
        """The producer, with the topic's metadata at hand: then `send` does not block."""
        if self._producer is None or topic not in self._known:
            async with self._starting:
                await asyncio.to_thread(self._prepare, topic)
                self._known.add(topic)
        return self._producer

    def _prepare(self, topic: str) -> None:
        try:
            if self._producer is None:
                self._producer = KafkaProducer(
                    **self._common,
                    delivery_timeout_ms=int(self._publish_deadline_s * 1000),
                    request_timeout_ms=int(min(REQUEST_DEADLINE_S, self._publish_deadline_s / 2) * 1000),
                    max_block_ms=int(METADATA_DEADLINE_S * 1000),
                    allow_auto_create_topics=False,
                    linger_ms=LINGER_MS,
                    batch_size=BATCH_BYTES,
                )
            self._producer.partitions_for(topic)
        except KafkaTimeoutError as error:
            if self._producer is not None and self._is_missing(topic):
                raise LookupError(f"topic {topic} does not exist: create it with ensure_topics") from error
            raise Transient(f"no answer from Kafka: {error}") from error
        except KafkaError as error:
            raise Transient(f"no answer from Kafka: {error!r}") from error

    def _is_missing(self, topic: str) -> bool:
        """Whether the brokers answer, and know nothing of the topic."""
        with contextlib.suppress(KafkaError), KafkaAdminClient(**self._common) as admin:
            return topic not in admin.list_topics()
        return False

    def _reader(self) -> KafkaConsumer:
        """A consumer without a group."""
        try:
            return KafkaConsumer(
                **self._common,
                enable_auto_commit=False,
                auto_offset_reset="earliest",  # what retention has removed is skipped, and no more than that
                allow_auto_create_topics=False,
            )
        except KafkaError as error:
            raise Transient(f"no answer from Kafka: {error!r}") from error

    def _create(self, topics: Mapping[str, TopicSpec]) -> None:
        """Partitions and configuration of the specs; replicas as the cluster's default says."""
        try:
            with KafkaAdminClient(**self._common) as admin:
                present = set(admin.list_topics())
                missing = {name: _new_topic(name, spec) for name, spec in topics.items() if name not in present}
                if missing:
                    answer = admin.create_topics(missing, raise_errors=False)
                    for topic in answer["topics"]:
                        error = for_code(topic["error_code"])
                        if error not in (NoError, TopicAlreadyExistsError):  # another process creates them too
                            raise error(f"{topic['name']}: {topic.get('error_message')}")
                    admin.wait_for_topics(list(missing))
        except RetriableError as error:
            raise Transient(f"Kafka did not create the topics: {error!r}") from error


def encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _assign(consumer: KafkaConsumer, topic: str, from_beginning: bool, offsets: Mapping[int, int]) -> None:
    """Give it the topic with its positions settled: what is published from now on is after its end."""
    partitions = [TopicPartition(topic, partition) for partition in consumer.partitions_for_topic(topic)]
    if not partitions:
        raise LookupError(f"topic {topic} does not exist: create it with ensure_topics")
    consumer.assign(partitions)
    (consumer.seek_to_beginning if from_beginning else consumer.seek_to_end)()
    if offsets:
        check_offsets(topic, offsets, {partition.partition: end for partition, end in _ends(consumer).items()})
        for partition, offset in offsets.items():
            consumer.seek(TopicPartition(topic, partition), offset)
    for partition in partitions:
        consumer.position(partition, timeout_ms=METADATA_DEADLINE_S * 1000)


def _ends(consumer: KafkaConsumer) -> dict[TopicPartition, int]:
    try:
        ends: dict[TopicPartition, int] = consumer.end_offsets(consumer.assignment(), METADATA_DEADLINE_S * 1000)
    except KafkaError as error:
        raise Transient(f"no answer from Kafka: {error!r}") from error
    return ends


def _has_reached(consumer: KafkaConsumer, ends: Mapping[TopicPartition, int]) -> bool:
    """By positions and not by events: compaction leaves gaps in the offsets."""
    timeout_ms = METADATA_DEADLINE_S * 1000
    return all((consumer.position(partition, timeout_ms) or 0) >= end for partition, end in ends.items())


def _new_topic(name: str, spec: TopicSpec) -> dict[str, Any]:
    configs = {"cleanup.policy": "compact"} if spec.compacted else {}
    if name.endswith(dlq("")):
        configs["retention.ms"] = str(DLQ_RETENTION_MS)
    return {"num_partitions": spec.partitions, "configs": configs}
