"""The bus: durable topics of events, at least once, behind one small interface with two implementations.

Invariants, held by both and checked by one contract test suite (tests/chassis/bus/test_contract*.py):
- Events of one key lie in one partition, in the order they were published; handlers are *started* in that order.
- Within a group every partition has one owner; each event is handed to a handler at least once. What may come twice:
  events that were under way when their owner died, stopped beyond its grace, or lost the partition.
- An offset is committed only when every offset below it is done: handled, moved to `<topic>.retry`, or to
  `<topic>.dlq`.
- A group that has never committed starts at the oldest event.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.chassis.errors import BadInput
from services.chassis.settings import BusSettings
from services.chassis.topics import TopicSpec

# Kafka's own default limit of a record is 1,048,588 bytes; the rest is for the failure headers of a dead letter.
MAX_EVENT_BYTES = 1_000_000


@dataclass(frozen=True, slots=True)
class Event:
    """One event as its handler sees it. `topic`, `partition` and `offset` say where it was first published: they are
    the same when it comes again through the retry topic, so (topic, partition, offset) identifies it for ever.

    key: "" means no key (on Kafka: any partition). Bytes that are not UTF-8 survive as surrogate escapes, as in
    os.fsdecode. attempt: 1 at first; counts every call of a handler for this event, in place and through the retry
    topic.
    """

    topic: str
    key: str
    value: bytes
    headers: Mapping[str, str]
    partition: int
    offset: int
    attempt: int = 1


Handler = Callable[[Event], Awaitable[None]]


class Bus(Protocol):
    """Not thread-safe: one bus belongs to one event loop. One bus may run several consume() and read() at once."""

    async def publish(self, topic: str, key: str, value: bytes, headers: Mapping[str, str]) -> None:
        """Return when the event is durable. Publishes that are under way together are batched: gather many.

        Raises BadInput if it is larger than MAX_EVENT_BYTES, Transient if the bus does not take it within its deadline
        (it may be there nevertheless), LookupError if the topic does not exist (a fault of the installation: see
        ensure_topics)."""

    async def consume(
        self, topics: Sequence[str], group: str, handler: Handler, *, max_in_flight: int, stop: asyncio.Event
    ) -> None:
        """Hand each event of the topics and of their retry topics to the handler, at most `max_in_flight` at once.

        Handler's outcome: returns → done; BadInput → dead letter; Transient or Exhausted → again in place after a short
        back-off, then through `<topic>.retry`, then dead letter; any other exception is a bug: it is raised here after
        what was done is committed, and the event comes again to the next consumer. Returns when `stop` is set and the
        handlers under way are done (bounded: after a grace they are cancelled and their events come again). Raises
        LookupError if one of the topics does not exist, Transient if the bus cannot be reached at the start."""

    def read(
        self,
        topic: str,
        *,
        from_beginning: bool,
        stop: asyncio.Event,
        caught_up: asyncio.Event | None = None,
        offsets: Mapping[int, int] | None = None,
    ) -> AsyncGenerator[Event, None]:
        """Every event of the topic, without a group and without commits, until `stop` is set; headers as they lie in
        the log. `from_beginning=False`: what is published after the first iteration began. `caught_up` is set when all
        that lay there at the first iteration was handed out and the next is asked for. Close it (contextlib.aclosing)
        to end early.

        offsets: partition → the next offset to read (an event's `offset` + 1), for the partitions that start there
        whatever `from_beginning` says. Where retention has removed what lay there, the oldest that is kept comes first.

        Raises LookupError at the first iteration if the topic or a partition of `offsets` does not exist, or if an
        offset is none of that partition's: negative, or beyond the end. An offset beyond the end was read from a log
        that has since lost events or was created anew; waiting there would skip what is published until then."""

    async def ensure_topics(self, topics: Mapping[str, TopicSpec]) -> None:
        """Create those that are missing of the topics, their `.retry` and their `.dlq`. Existing ones are left as they
        are. Compaction is Kafka's; the embedded log keeps everything."""

    async def close(self) -> None:
        """Flush and let go of connections. Call it when no consume() is running."""


def check_size(key: str, value: bytes, headers: Mapping[str, str]) -> None:
    """Raise BadInput if the event is larger than MAX_EVENT_BYTES (characters of headers are counted as one byte)."""
    size = len(key) + len(value) + sum(len(name) + len(text) for name, text in headers.items())
    if size > MAX_EVENT_BYTES:
        raise BadInput(
            f"event of {size} bytes is larger than the limit of {MAX_EVENT_BYTES}; images travel by reference"
        )


def check_offsets(topic: str, offsets: Mapping[int, int], ends: Mapping[int, int]) -> None:
    """Raise LookupError if read() cannot start there. offsets and ends: partition → next offset; ends holds every
    partition of the topic."""
    for partition, offset in offsets.items():
        if partition not in ends:
            raise LookupError(f"topic {topic} has no partition {partition}, only 0 to {len(ends) - 1}")
        if not 0 <= offset <= ends[partition]:
            raise LookupError(f"partition {partition} of {topic} ends at {ends[partition]} and has no offset {offset}")


def make_bus(settings: BusSettings) -> Bus:
    """Kafka if `kafka_bootstrap_servers` is set, else the embedded log in `data_dir`. Connects at first use."""
    if settings.kafka_bootstrap_servers:
        from services.chassis.bus.kafka import KafkaBus

        instance = settings.kafka_group_instance_id or None
        return KafkaBus(settings.kafka_bootstrap_servers, group_instance_id=instance)
    from services.chassis.bus.sqlite import SqliteBus

    return SqliteBus(settings.data_dir / "bus.db")
