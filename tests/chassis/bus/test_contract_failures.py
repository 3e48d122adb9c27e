"""What every bus must do with events that fail; each test runs on the embedded log and on a real Kafka broker."""

import asyncio

import pytest

from services.chassis.bus import MAX_EVENT_BYTES, Event
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from services.chassis.topics import dlq, retry
from tests.chassis.bus.stores import FAST, Collector, Store, consuming, publish, read


@pytest.mark.parametrize("error", [BadInput("not a protobuf"), NotFound("no such file")], ids=["bad", "missing"])
async def test_bad_input_becomes_a_dead_letter(store: Store, error: BadInput) -> None:
    bus, topic = store.bus(), await store.topic(partitions=1)
    await bus.publish(topic, "k", b"fine", {})
    await bus.publish(topic, "line", b"\xffbroken", {"ce_id": "7"})

    async def handle(event: Event) -> None:
        if event.value != b"fine":
            raise error

    async with consuming(bus, topic, handle):
        (letter,) = await read(bus, dlq(topic), 1)
    assert (letter.key, letter.value) == ("line", b"\xffbroken")
    assert "T" in letter.headers["agentiad-failed-at"]
    assert {**letter.headers, "agentiad-failed-at": ""} == {
        "ce_id": "7",
        "agentiad-error": type(error).__name__,
        "agentiad-reason": str(error),
        "agentiad-source-topic": topic,
        "agentiad-source-partition": "0",
        "agentiad-source-offset": "1",
        "agentiad-group": "g",
        "agentiad-attempts": "1",
        "agentiad-failed-at": "",
    }


@pytest.mark.parametrize("error", [Transient("redis is away"), Exhausted("the queue is full")], ids=type)
async def test_transient_error_is_tried_again_in_place(store: Store, error: Exception) -> None:
    bus, topic = store.bus(), await store.topic()
    collector = Collector()

    async def handle(event: Event) -> None:
        if event.attempt == 1:
            raise error
        await collector(event)

    await publish(bus, topic, "a")
    async with consuming(bus, topic, handle):
        (event,) = await collector.count(1)
    assert event.attempt == 2


async def test_lasting_error_goes_through_the_retry_topic(store: Store) -> None:
    """Its offset, partition, key and headers stay the event's own, and the events behind it do not wait for it."""
    bus, topic = store.bus(), await store.topic(partitions=1)
    collector, tried = Collector(), []

    async def handle(event: Event) -> None:
        if event.value == b"late":
            tried.append(asyncio.get_running_loop().time())
            if event.attempt <= 4:
                raise Transient("not yet")
        await collector(event)

    await bus.publish(topic, "k", b"late", {"ce_id": "7"})
    await publish(bus, topic, "a", "b")
    async with consuming(bus, topic, handle, max_in_flight=1):
        events = await collector.count(3)
    assert [event.value for event in events] == [b"a", b"b", b"late"]
    late = events[-1]
    assert (late.topic, late.partition, late.offset, late.key, late.attempt) == (topic, 0, 0, "k", 5)
    assert late.headers == {"ce_id": "7"}
    assert tried[2] - tried[1] >= FAST.delay_s(2)
    assert tried[4] - tried[3] >= FAST.delay_s(4)


async def test_endless_error_becomes_a_dead_letter(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    calls = []

    async def handle(event: Event) -> None:
        calls.append(event.attempt)
        raise Transient("never")

    await bus.publish(topic, "k", b"body", {"ce_id": "7"})
    async with consuming(bus, topic, handle):
        (letter,) = await read(bus, dlq(topic), 1)
    assert calls == [1, 2, 3, 4, 5, 6]
    assert (letter.value, letter.headers["ce_id"], letter.headers["agentiad-attempts"]) == (b"body", "7", "6")
    assert letter.headers["agentiad-source-topic"] == topic


async def test_retry_belongs_to_the_group_that_failed(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    well, ill = Collector(), Collector()

    async def fail_twice(event: Event) -> None:
        if event.attempt <= FAST.in_place:
            raise Transient("not yet")
        await ill(event)

    await publish(bus, topic, "a")
    async with consuming(bus, topic, fail_twice, group="ill"), consuming(bus, topic, well, group="well"):
        await ill.count(1)
        await publish(bus, topic, "b")
        await asyncio.gather(ill.count(2), well.count(2))
    assert well.values == [b"a", b"b"]


async def test_strange_record_in_the_retry_topic_is_handled(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await publish(bus, retry(topic), "by hand")
    async with consuming(bus, topic, collector := Collector()):
        (event,) = await collector.count(1)
    assert (event.topic, event.value, event.attempt) == (topic, b"by hand", 1)


async def test_too_large_event_is_refused(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    with pytest.raises(BadInput, match="larger"):
        await bus.publish(topic, "k", bytes(MAX_EVENT_BYTES + 1), {})
    await bus.publish(topic, "k", bytes(MAX_EVENT_BYTES - 1), {})
    async with consuming(bus, topic, collector := Collector()):
        assert len((await collector.count(1))[0].value) == MAX_EVENT_BYTES - 1


async def test_too_large_event_of_another_publisher_becomes_a_dead_letter(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await asyncio.to_thread(store.append, topic, "k", bytes(MAX_EVENT_BYTES + 40_000))
    async with consuming(bus, topic, collector := Collector()):
        (letter,) = await read(bus, dlq(topic), 1)
    assert not collector.events
    assert letter.headers["agentiad-omitted-bytes"] == str(MAX_EVENT_BYTES + 40_000)
    assert "larger" in letter.headers["agentiad-reason"]
