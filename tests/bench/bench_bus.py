"""Events a second through consume → handler (costs nothing) → publish, against a bare kafka-python loop in the same
run.

Both read the same EVENTS events of 500 bytes from 6 partitions of a real broker, write one event for each and wait for
all acknowledgements. The clock starts with the first event in hand (joining the group is not throughput) and stops with
the last acknowledgement. The bare loop is measured with kafka-python's own settings and with ours; the better one
counts.
"""

import asyncio
import statistics
import time
import uuid
from typing import Any

from kafka import KafkaConsumer, KafkaProducer

from services.chassis.bus import Event
from services.chassis.bus.kafka import BATCH_BYTES, LINGER_MS, KafkaBus
from services.chassis.topics import dlq
from tests.chassis.bus.stores import Store

EVENTS = 10_000
BYTES = 500
ROUNDS = 3
MAX_IN_FLIGHT = 128
GOAL = 0.5
OURS = {"linger_ms": LINGER_MS, "batch_size": BATCH_BYTES}


async def test_pipeline_against_the_bare_loop(kafka: str) -> None:
    store = Store("kafka", kafka)
    source, sink = await store.topic(partitions=6), await store.topic(partitions=6)
    bus = store.bus()
    await asyncio.gather(*(bus.publish(source, f"line-{n % 60}", bytes(BYTES), {}) for n in range(EVENTS)))
    rates: dict[str, list[float]] = {"bare": [], "bare, our settings": [], "bus": []}
    for _ in range(ROUNDS):
        rates["bare"].append(await asyncio.to_thread(bare_loop, kafka, source, sink, {}))
        rates["bare, our settings"].append(await asyncio.to_thread(bare_loop, kafka, source, sink, OURS))
        rates["bus"].append(await pipeline(KafkaBus(kafka), source, sink))
    for made in store.made:
        await made.close()
    median = {name: statistics.median(rates) for name, rates in rates.items()}
    ratio = median["bus"] / max(median["bare"], median["bare, our settings"])
    report = ", ".join(f"{name} {rate:.0f}" for name, rate in median.items())
    print(f"\nevents/s: {report}; the bus makes {ratio:.2f} of the better bare loop (goal {GOAL})")
    assert ratio >= GOAL


def bare_loop(servers: str, source: str, sink: str, settings: dict[str, Any]) -> float:
    consumer = KafkaConsumer(source, bootstrap_servers=servers, group_id=uuid.uuid4().hex, auto_offset_reset="earliest")
    producer = KafkaProducer(bootstrap_servers=servers, **settings)
    producer.partitions_for(sink)
    seen, start = 0, 0.0
    while seen < EVENTS:
        for records in consumer.poll(200).values():
            start = start or time.perf_counter()
            for record in records:
                producer.send(sink, record.value, record.key)
            seen += len(records)
    producer.flush()
    seconds = time.perf_counter() - start
    consumer.close()
    producer.close()
    return EVENTS / seconds


async def pipeline(bus: KafkaBus, source: str, sink: str) -> float:
    stop = asyncio.Event()
    seen, start, end = 0, 0.0, 0.0

    async def handle(event: Event) -> None:
        nonlocal seen, start, end
        start = start or time.perf_counter()
        await bus.publish(sink, event.key, event.value, event.headers)
        seen += 1
        if seen == EVENTS:
            end = time.perf_counter()
            stop.set()

    await bus.publish(dlq(sink), "", b"", {})  # connects the producer before the clock starts, as in the bare loop
    await bus.consume([source], uuid.uuid4().hex, handle, max_in_flight=MAX_IN_FLIGHT, stop=stop)
    await bus.close()
    return EVENTS / (end - start)
