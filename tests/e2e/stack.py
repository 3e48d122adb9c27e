"""A stack of real processes: the services as an orchestrator would start them, and a plant's end of the bus."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from agentiad.v1 import events_pb2, retrieval_pb2
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from services.chassis import rpc, topics
from services.chassis.bus import Bus, Event, make_bus
from services.chassis.images import ImageStore
from services.chassis.settings import BusSettings
from services.cli.processes import Child, ready, service
from services.data.procedural import write_set
from services.data.readers import Sample, read
from tests.harness.process import free_port


@dataclass
class Stack:
    """`parts`: pictures that nobody has inspected yet. `normals`: what the library holds. `agents`: their processes."""

    bus: Bus
    images: ImageStore
    folder: Path
    parts: list[Sample]
    normals: list[Sample]
    agents: list[Child]
    environment: Mapping[str, str]
    running: AsyncExitStack = field(repr=False)

    async def start_agent(self) -> Child:
        address = f"127.0.0.1:{free_port()}"
        child = await self.running.enter_async_context(service("agent", address, self.environment))
        await ready(child, address, asyncio.Event())
        self.agents.append(child)
        return child

    async def inspections(self, enough: int) -> list[events_pb2.InspectionCompleted]:
        """Every inspection of the topic, copies included, until there are `enough` different events."""
        found: list[events_pb2.InspectionCompleted] = []
        async with aclosing(self._read(topics.INSPECTIONS)) as events:
            async for event in events:
                found.append(events_pb2.InspectionCompleted.FromString(event.value))
                if len({inspection.event_id for inspection in found}) >= enough:
                    return found
        raise AssertionError("the topic ended")

    async def dead_letters(self, enough: int) -> list[Event]:
        found: list[Event] = []
        async with aclosing(self._read(topics.dlq(topics.IMAGES))) as events:
            async for event in events:
                found.append(event)
                if len(found) >= enough:
                    return found
        raise AssertionError("the topic ended")

    def _read(self, topic: str) -> AsyncIterator[Event]:
        return self.bus.read(topic, from_beginning=True, stop=asyncio.Event())


@asynccontextmanager
async def stack(folder: Path, settings: Mapping[str, str], *, per_category: int, agents: int) -> AsyncIterator[Stack]:
    """policy, zoom, retrieval and agents as processes; the exemplar library filled; topics made.

    `settings`: where Kafka, Redis, Milvus and Triton are (without KAFKA_BOOTSTRAP_SERVERS the bus is the embedded one).
    """
    samples = read(write_set(folder / "parts", per_category=per_category))
    names = ("policy", "zoom", "retrieval")
    addresses = {name: f"127.0.0.1:{free_port()}" for name in names}
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1",
        "DATA_DIR": str(folder), "IMAGE_ROOTS": str(folder), "IMAGE_STORE": str(folder / "images"),
        **{f"{name.upper()}_ADDRESS": address for name, address in addresses.items()}, **settings,
    }  # fmt: skip
    bus = make_bus(BusSettings(data_dir=folder, kafka_bootstrap_servers=settings.get("KAFKA_BOOTSTRAP_SERVERS", "")))
    images = ImageStore([str(folder)])
    async with AsyncExitStack() as running:
        running.push_async_callback(bus.close)
        await bus.ensure_topics(topics.TOPICS)
        children = [await running.enter_async_context(service(name, addresses[name], environment)) for name in names]
        await asyncio.gather(*(ready(child, addresses[child.name], asyncio.Event()) for child in children))
        normals = [sample for sample in samples if sample.split == "train"]
        async with rpc.channel(addresses["retrieval"]) as channel:
            for category in {sample.category for sample in normals}:
                references = [images.describe(sample.image) for sample in normals if sample.category == category]
                request = retrieval_pb2.AddExemplarsRequest(category=category, images=references)
                await RetrievalServiceStub(channel).AddExemplars(request)
        parts = [sample for sample in samples if sample.split != "train"]
        made = Stack(bus, images, folder, parts, normals, [], environment, running)
        for _ in range(agents):
            await made.start_agent()
        yield made
