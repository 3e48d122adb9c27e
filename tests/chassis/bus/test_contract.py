"""What every bus must do; each test runs on the embedded log and on a real Kafka broker."""

import asyncio
import json
import sys
from collections import defaultdict
from contextlib import aclosing

import pytest

from agentiad.v1.events_pb2 import ImageCaptured
from services.chassis.bus import Event
from services.chassis.topics import TopicSpec
from tests.chassis.bus.stores import PATIENCE_S, Collector, Store, consuming, publish, read


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
    first = Collector()
    second = Collector(beside=first)
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


async def test_unknown_topic(store: Store) -> None:
    bus = store.bus()
    with pytest.raises(LookupError, match="ensure_topics"):
        await bus.publish("test-nowhere", "k", b"", {})
    with pytest.raises(LookupError, match="ensure_topics"):
        await bus.consume(["test-nowhere"], "g", Collector(), max_in_flight=1, stop=asyncio.Event())
    with pytest.raises(LookupError, match="ensure_topics"):
        await anext(bus.read("test-nowhere", from_beginning=True, stop=asyncio.Event()))


async def test_ensure_topics_leaves_what_is_there(store: Store) -> None:
    bus, topic = store.bus(), await store.topic(partitions=1)
    await publish(bus, topic, "a")
    await bus.ensure_topics({topic: TopicSpec(5, True, ImageCaptured)})
    assert [event.value for event in await read(bus, topic, 1)] == [b"a"]


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


@pytest.mark.parametrize("old", ["", "abc"])
async def test_read_says_when_it_has_caught_up(store: Store, old: str) -> None:
    bus, topic = store.bus(), await store.topic()
    await publish(bus, topic, *old)
    stop, caught_up, collector = asyncio.Event(), asyncio.Event(), Collector()

    async def collect() -> None:
        async for event in bus.read(topic, from_beginning=True, stop=stop, caught_up=caught_up):
            assert caught_up.is_set() == (event.value == b"new")
            await collector(event)

    async with asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
        group.create_task(collect())
        await caught_up.wait()
        assert len(collector.events) == len(old)
        await publish(bus, topic, "new")
        await collector.count(len(old) + 1)
        stop.set()


async def test_events_survive_the_bus(store: Store) -> None:
    topic = await store.topic()
    first = store.bus()
    body = json.dumps({"n": 1}).encode()
    await first.publish(topic, "k", body, {})
    await first.close()
    store.made.remove(first)
    assert [event.value for event in await read(store.bus(), topic, 1)] == [body]
