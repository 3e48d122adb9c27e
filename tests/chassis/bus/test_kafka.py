"""What only Kafka has: polls that must go on, rebalances, brokers that go away."""

import asyncio
from pathlib import Path

import pytest

from services.chassis.bus import Event
from services.chassis.bus.kafka import KafkaBus
from services.chassis.errors import Transient
from tests.chassis.bus.stores import FAST, PATIENCE_S, Collector, Store, consuming, publish, read_all
from tests.harness.kafka import Broker

pytestmark = pytest.mark.kafka


@pytest.fixture
async def store(kafka: str) -> Store:
    return Store("kafka", kafka)


async def test_slow_handler_does_not_lose_the_group(store: Store) -> None:
    """Longer than max.poll.interval, and with more events waiting than fit in memory."""
    topic = await store.topic(partitions=1)
    bus = KafkaBus(store.place, retry_policy=FAST, max_poll_interval_s=2, session_timeout_s=1.5)
    await asyncio.gather(*(store.made[0].publish(topic, "k", b"%d" % number, {}) for number in range(1200)))
    collector = Collector()

    async def handle(event: Event) -> None:
        if event.value == b"0":
            await asyncio.sleep(5)
        await collector(event)

    async with consuming(bus, topic, handle, max_in_flight=1):
        await collector.count(1200)
    assert [int(value) for value in collector.values] == list(range(1200))


async def test_partition_moves_to_a_new_member_when_its_handlers_are_done(store: Store) -> None:
    topic = await store.topic(partitions=2)
    publisher, gate = store.made[0], asyncio.Event()
    await asyncio.gather(*(publisher.publish(topic, f"old-{number}", b"", {}) for number in range(20)))
    begun, finished = Collector(), Collector()
    second = Collector(beside=finished)

    async def handle(event: Event) -> None:
        await begun(event)
        await gate.wait()
        await finished(event)

    async with consuming(store.bus(grace_s=PATIENCE_S), topic, handle, max_in_flight=20):
        await begun.count(20)
        async with consuming(store.bus(), topic, second):
            asyncio.get_running_loop().call_later(2, gate.set)
            number = 0
            async with asyncio.timeout(PATIENCE_S):
                while not second.events:
                    await publish(publisher, topic, "", key=f"new-{number}")
                    number += 1
                    await asyncio.sleep(0.05)
            await second.until(lambda _: len(finished.events) + len(second.events) == 20 + number)
    assert not [event.key for event in second.events if event.key.startswith("old")]
    assert len({event.key for event in finished.events + second.events}) == 20 + number


async def test_full_member_lets_another_one_join(store: Store) -> None:
    """It has no room for a long time, and must go through the rebalance all the same."""
    topic = await store.topic(partitions=2)
    publisher, gate = store.made[0], asyncio.Event()
    await asyncio.gather(*(publisher.publish(topic, f"k{number}", b"%d" % number, {}) for number in range(2500)))
    begun, second = Collector(), Collector()

    async def block(event: Event) -> None:
        await begun(event)
        await gate.wait()

    async with consuming(store.bus(grace_s=0.5), topic, block, max_in_flight=1):
        await begun.count(1)
        async with consuming(store.bus(), topic, second, max_in_flight=100):
            await second.count(500)
            gate.set()


async def test_static_members_come_back_to_their_partitions(store: Store) -> None:
    topic = await store.topic(partitions=2)
    publisher = store.made[0]
    for value in ("a", "b"):
        bus = KafkaBus(store.place, group_instance_id="pod-0", session_timeout_s=30)
        await publish(publisher, topic, value)
        async with consuming(bus, topic, collector := Collector()):
            await collector.count(1)
        assert collector.values == [value.encode()]


async def test_reading_goes_on_after_retention_has_removed_everything(store: Store) -> None:
    """A reader that was away for longer than events are kept: its offset is older than the only one that is left."""
    bus, topic = store.bus(), await store.topic(partitions=1)
    await publish(bus, topic, *"abc")
    store.remove(topic, 0, before=3)
    assert not await read_all(bus, topic, offsets={0: 1})
    await publish(bus, topic, "new")
    assert [event.value for event in await read_all(bus, topic, offsets={0: 1})] == [b"new"]


async def test_broker_may_be_away_for_seconds(tmp_path: Path) -> None:
    broker = Broker(tmp_path)
    try:
        broker.start()
        store = Store("kafka", broker.address)
        topic = await store.topic()
        bus = store.bus()
        await publish(bus, topic, "before")
        collector = Collector()
        async with consuming(bus, topic, collector):
            await collector.count(1)
            broker.stop()
            during = asyncio.create_task(publish(bus, topic, "during"))
            await asyncio.sleep(2)
            assert not during.done()
            await asyncio.to_thread(broker.start)
            await during
            await publish(bus, topic, "after")
            await collector.until(lambda _: set(collector.values) == {b"before", b"during", b"after"})
        await bus.close()
    finally:
        broker.stop()


async def test_publish_gives_up_at_its_deadline(tmp_path: Path) -> None:
    """And works again when the broker is back."""
    broker = Broker(tmp_path)
    try:
        broker.start()
        topic = await Store("kafka", broker.address).topic()
        bus = KafkaBus(broker.address, publish_deadline_s=2)
        await publish(bus, topic, "before")
        broker.stop()
        with pytest.raises(Transient):
            await publish(bus, topic, "lost")
        await asyncio.to_thread(broker.start)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    await publish(bus, topic, "after")
                    break
                except Transient:
                    await asyncio.sleep(0.1)
        await bus.close()
        with pytest.raises(Transient):
            await KafkaBus("127.0.0.1:1", publish_deadline_s=1).publish(topic, "k", b"", {})
    finally:
        broker.stop()
