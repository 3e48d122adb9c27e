"""What every bus must do; each test runs on the embedded log and on a real Kafka broker."""

import asyncio
import json
import sys
from collections import defaultdict
from contextlib import aclosing

import pytest

from services.chassis.bus import MAX_EVENT_BYTES, Event
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from services.chassis.topics import dlq, retry
from tests.chassis.bus.stores import FAST, PATIENCE_S, Collector, Store, consuming, publish, read


async def test_event_comes_as_it_was_published(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    headers = {"ce_id": "1", "traceparent": "00-ab", "umlaut": "ä"}
    for key, value in (("line-1", b"\x00\xff"), ("", b""), ("\udcff", b"x")):
        await bus.publish(topic, key, value, headers)
    async with consuming(bus, topic, collector := Collector()):
        events = await collector.count(3)
    assert {(event.key, event.value) for event in events} == {("line-1", b"\x00\xff"), ("", b""), ("\udcff", b"x")}
    assert all(event.headers == headers and event.attempt == 1 and event.topic == topic for event in events)


async def test_events_of_a_key_come_in_order(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    published = [(f"line-{number % 5}", str(number).encode()) for number in range(300)]
    for start in range(0, 300, 5):  # many publishes under way at once, one of each key
        await asyncio.gather(*(bus.publish(topic, key, value, {}) for key, value in published[start : start + 5]))
    async with consuming(bus, topic, collector := Collector()):
        events = await collector.count(300)
    seen = defaultdict(list)
    for event in events:
        seen[event.key].append(event.value)
    expected = defaultdict(list)
    for key, value in published:
        expected[key].append(value)
    assert seen == expected
    assert all(len({event.partition for event in events if event.key == key}) == 1 for key in seen)


async def test_each_group_sees_everything(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await publish(bus, topic, *"abcdef")
    first, second = Collector(), Collector()
    async with consuming(bus, topic, first, group="one"), consuming(bus, topic, second, group="two"):
        await asyncio.gather(first.count(6), second.count(6))
    assert first.values == second.values == [b"a", b"b", b"c", b"d", b"e", b"f"]


async def test_members_share_a_group(store: Store) -> None:
    topic, publisher = await store.topic(partitions=4), store.bus()
    first, second = Collector(), Collector()
    published = 0
    async with consuming(store.bus(), topic, first), consuming(store.bus(), topic, second):
        async with asyncio.timeout(PATIENCE_S):
            while not (first.events and second.events):
                await asyncio.gather(
                    *(publisher.publish(topic, f"k{n}", b"%d" % n, {}) for n in range(published, published + 16))
                )
                published += 16
                await asyncio.sleep(0.1)
        await first.until(lambda _: len(first.events) + len(second.events) >= published)
    assert sorted(map(int, first.values + second.values)) == list(range(published))


async def test_committed_events_do_not_come_again(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await publish(bus, topic, "a", "b")
    async with consuming(bus, topic, collector := Collector()):
        await collector.count(2)
    await publish(bus, topic, "c")
    async with consuming(store.bus(), topic, collector := Collector()):
        await collector.count(1)
    assert collector.values == [b"c"]


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


async def test_crash_commits_only_below_the_first_unfinished_event(store: Store) -> None:
    bus, topic = store.bus(), await store.topic(partitions=1)
    await publish(bus, topic, *"0123456789")
    others = Collector()

    async def handle(event: Event) -> None:
        if event.value == b"3":
            await others.count(9)
            raise ZeroDivisionError("a bug")
        await others(event)

    with pytest.raises(ZeroDivisionError):
        async with consuming(bus, topic, handle, max_in_flight=10) as task:
            await asyncio.wait([task], timeout=PATIENCE_S)
    async with consuming(store.bus(), topic, again := Collector()):
        await again.until(lambda events: b"9" in {event.value for event in events})
    assert again.values == [b"3", b"4", b"5", b"6", b"7", b"8", b"9"]


async def test_cancelled_handler_is_a_bug(store: Store) -> None:
    """A cancelled RPC raises CancelledError in a handler that nobody cancelled: the event must not be forgotten."""
    bus, topic = store.bus(), await store.topic()
    await publish(bus, topic, "a")

    async def handle(event: Event) -> None:
        raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match="cancelled"):
        async with consuming(bus, topic, handle) as task:
            await asyncio.wait([task], timeout=PATIENCE_S)
    async with consuming(bus, topic, collector := Collector()):
        await collector.count(1)


async def test_no_more_than_max_in_flight(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    running, peak = 0, 0
    collector = Collector()

    async def handle(event: Event) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        await asyncio.sleep(0.005)
        running -= 1
        await collector(event)

    await asyncio.gather(*(bus.publish(topic, f"k{n}", b"x", {}) for n in range(60)))
    async with consuming(bus, topic, handle, max_in_flight=7):
        await collector.count(60)
    assert peak == 7


async def test_more_events_than_are_kept_in_memory(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await asyncio.gather(*(bus.publish(topic, f"k{n}", b"%d" % n, {}) for n in range(3000)))
    async with consuming(bus, topic, collector := Collector(), max_in_flight=3):
        await collector.count(3000)
    assert sorted(map(int, collector.values)) == list(range(3000))


async def test_killed_member_is_replaced(store: Store) -> None:
    topic = await store.topic(partitions=1)
    await publish(store.bus(), topic, "a", "b")
    command = [sys.executable, "-m", "tests.chassis.bus.hanging_consumer", store.kind, store.place, topic]
    victim = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert victim.stdout is not None
    assert await asyncio.wait_for(victim.stdout.readline(), PATIENCE_S) == b"a\n"
    victim.kill()
    await victim.wait()
    async with consuming(store.bus(), topic, collector := Collector()):
        await collector.count(2)
    assert collector.values == [b"a", b"b"]


async def test_stop_waits_for_handlers_under_way(store: Store) -> None:
    bus, topic = store.bus(), await store.topic(partitions=1)
    await publish(bus, topic, "a", "b")
    begun, gate = Collector(), asyncio.Event()

    async def handle(event: Event) -> None:
        await begun(event)
        await gate.wait()

    stop = asyncio.Event()
    task = asyncio.create_task(bus.consume([topic], "g", handle, max_in_flight=1, stop=stop))
    await begun.count(1)
    stop.set()
    asyncio.get_running_loop().call_later(0.5, gate.set)
    await asyncio.wait_for(task, PATIENCE_S)
    async with consuming(store.bus(), topic, collector := Collector()):
        await collector.count(1)
    assert (begun.values, collector.values) == ([b"a"], [b"b"])


async def test_stop_is_bounded(store: Store) -> None:
    bus, topic = store.bus(grace_s=0.3), await store.topic()
    await publish(bus, topic, "a")
    begun, cancelled = Collector(), asyncio.Event()

    async def handle(event: Event) -> None:
        await begun(event)
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    async with consuming(bus, topic, handle):
        await begun.count(1)
    assert cancelled.is_set()
    async with consuming(bus, topic, collector := Collector()):
        await collector.count(1)


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


async def test_unknown_topic(store: Store) -> None:
    bus = store.bus()
    with pytest.raises(LookupError, match="ensure_topics"):
        await bus.publish("test-nowhere", "k", b"", {})
    with pytest.raises(LookupError, match="ensure_topics"):
        await bus.consume(["test-nowhere"], "g", Collector(), max_in_flight=1, stop=asyncio.Event())
    with pytest.raises(LookupError, match="ensure_topics"):
        await anext(bus.read("test-nowhere", from_beginning=True, stop=asyncio.Event()))


async def test_read_from_the_end(store: Store) -> None:
    bus, topic = store.bus(), await store.topic()
    await publish(bus, topic, "old")
    async with aclosing(bus.read(topic, from_beginning=False, stop=asyncio.Event())) as log:
        first = asyncio.ensure_future(anext(log))
        while not first.done():  # the log's end is settled some time after the first iteration began
            await publish(store.made[0], topic, "new")
            await asyncio.sleep(0.05)
        assert (await first).value == b"new"


async def test_read_ends_when_told(store: Store) -> None:
    bus, topic, stop = store.bus(), await store.topic(), asyncio.Event()
    await publish(bus, topic, "a")
    events = []
    async with asyncio.timeout(PATIENCE_S):
        async for event in bus.read(topic, from_beginning=True, stop=stop):
            events.append(event)
            stop.set()
    assert [event.value for event in events] == [b"a"]


async def test_events_survive_the_bus(store: Store) -> None:
    topic = await store.topic()
    first = store.bus()
    body = json.dumps({"n": 1}).encode()
    await first.publish(topic, "k", body, {})
    await first.close()
    store.made.remove(first)
    assert [event.value for event in await read(store.bus(), topic, 1)] == [body]
