"""What every bus must do when a reader says where it goes on; each test runs on the embedded log and on a real Kafka
broker."""

import asyncio
from collections import defaultdict
from contextlib import aclosing

import pytest

from services.chassis.bus import Bus, Event
from tests.chassis.bus.stores import PATIENCE_S, Store, publish, read_all

PARTITIONS = 3

Log = dict[int, list[Event]]


def by_partition(events: list[Event]) -> Log:
    log = defaultdict(list)
    for event in events:
        log[event.partition].append(event)
    return dict(log)


async def make_log(bus: Bus, topic: str, number: int = 60) -> Log:
    """Publish so many events of as many keys; partition → its events, in order. Every partition gets some."""
    await asyncio.gather(*(bus.publish(topic, f"k{n}", b"%d" % n, {}) for n in range(number)))
    log = by_partition(await read_all(bus, topic))
    assert sorted(int(event.value) for events in log.values() for event in events) == list(range(number))
    assert len(log) == PARTITIONS
    assert min(map(len, log.values())) >= 4
    return log


def ends(log: Log) -> dict[int, int]:
    return {partition: events[-1].offset + 1 for partition, events in log.items()}


@pytest.mark.parametrize("from_beginning", [True, False])
async def test_read_goes_on_in_the_middle_of_every_partition(store: Store, from_beginning: bool) -> None:
    bus, topic = store.bus(), await store.topic(PARTITIONS)
    log = await make_log(bus, topic)
    middles = {partition: len(events) // 2 for partition, events in log.items()}
    offsets = {partition: log[partition][middle].offset for partition, middle in middles.items()}
    rest = await read_all(store.bus(), topic, from_beginning=from_beginning, offsets=offsets)
    assert by_partition(rest) == {partition: log[partition][middle:] for partition, middle in middles.items()}


async def test_a_reader_that_stops_anywhere_gets_each_event_once(store: Store) -> None:
    topic = await store.topic(PARTITIONS)
    log = await make_log(store.made[0], topic)
    seen: list[Event] = []
    offsets: dict[int, int] = {}
    async with asyncio.timeout(PATIENCE_S):
        while len(seen) < 60:
            async with aclosing(
                store.bus().read(topic, from_beginning=True, stop=asyncio.Event(), offsets=offsets)
            ) as events:
                for _ in range(min(13, 60 - len(seen))):
                    seen.append(event := await anext(events))
                    offsets[event.partition] = event.offset + 1
    assert by_partition(seen) == log
    assert offsets == ends(log)


@pytest.mark.parametrize("from_beginning", [True, False])
async def test_unnamed_partitions_start_where_from_beginning_says(store: Store, from_beginning: bool) -> None:
    bus, topic = store.bus(), await store.topic(PARTITIONS)
    log = await make_log(bus, topic)
    found = by_partition(await read_all(bus, topic, from_beginning=from_beginning, offsets={1: log[1][2].offset}))
    unnamed = {0: log[0], 2: log[2]} if from_beginning else {}
    assert found == unnamed | {1: log[1][2:]}


async def test_an_offset_at_the_end_waits_for_what_comes(store: Store) -> None:
    bus, topic = store.bus(), await store.topic(PARTITIONS)
    log = await make_log(bus, topic)
    caught_up, stop = asyncio.Event(), asyncio.Event()
    reading = bus.read(topic, from_beginning=True, stop=stop, caught_up=caught_up, offsets=ends(log))
    async with asyncio.timeout(PATIENCE_S), aclosing(reading) as events:
        first = asyncio.ensure_future(anext(events))
        await caught_up.wait()
        assert not first.done()
        await publish(bus, topic, "new")
        assert (await first).value == b"new"


async def test_an_offset_at_the_end_of_an_empty_topic(store: Store) -> None:
    bus, topic = store.bus(), await store.topic(PARTITIONS)
    assert not await read_all(bus, topic, offsets=dict.fromkeys(range(PARTITIONS), 0))


@pytest.mark.parametrize("offset", [0, 1, 2])
async def test_what_retention_has_removed_is_skipped(store: Store, offset: int) -> None:
    """The first three events are gone, whichever of them is asked for; the other partitions are not touched."""
    bus, topic = store.bus(), await store.topic(PARTITIONS)
    log = await make_log(bus, topic)
    store.remove(topic, 1, before=log[1][3].offset)
    offsets = {0: log[0][1].offset, 1: log[1][offset].offset, 2: ends(log)[2]}
    found = by_partition(await read_all(bus, topic, offsets=offsets))
    assert found == {0: log[0][1:], 1: log[1][3:]}


@pytest.mark.parametrize(
    ("offsets", "reason"),
    [
        ({0: 3}, "ends at 2 and has no offset 3"),
        ({0: -1}, "ends at 2 and has no offset -1"),
        ({0: 2, 1: 0}, "has no partition 1"),
    ],
)
async def test_offsets_that_the_log_never_had(store: Store, offsets: dict[int, int], reason: str) -> None:
    bus, topic = store.bus(), await store.topic(partitions=1)
    await publish(bus, topic, "a", "b")
    with pytest.raises(LookupError, match=reason):
        await anext(bus.read(topic, from_beginning=True, stop=asyncio.Event(), offsets=offsets))
