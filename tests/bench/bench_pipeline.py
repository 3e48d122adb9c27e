"""What the messages cost: episodes a second through Kafka, gRPC and Triton, against the bare loop of the same model.

Bare: the same servicers and the same runner in one process, called as Python functions. Both use one torch thread, the
same parts, the same number of episodes at once, and both are warm.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from agentiad.v1 import events_pb2, retrieval_pb2
from services.agent.inspector import Inspector
from services.agent.runner import Runner
from services.agent.settings import AgentSettings
from services.cli.plant import publish_image
from services.data.readers import Sample
from services.policy import service as policy_service
from services.policy.settings import PolicySettings
from services.retrieval import service as retrieval_service
from services.retrieval.settings import RetrievalSettings
from services.zoom import service as zoom_service
from services.zoom.settings import ZoomSettings
from tests.e2e.stack import Stack, stack
from tests.harness.milvus import milvus

EPISODES = 192
WARM_UP = 96
AT_ONCE = 32
ROUNDS = 3


class Direct:
    """A servicer, called like its stub."""

    def __init__(self, servicer: object) -> None:
        self._servicer = servicer

    def __getattr__(self, name: str) -> Any:
        return lambda request: getattr(self._servicer, name)(request, None)


async def test_pipeline_against_the_bare_loop(tmp_path: Path, kafka: str, triton: str, redis_url: str) -> None:
    settings = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka, "ENGINE_HOST": "triton", "TRITON_URL": triton, "REDIS_URL": redis_url,
        "TORCH_THREADS": "1", "MAX_IN_FLIGHT": str(AT_ONCE), "LOG_LEVEL": "WARNING",
    }  # fmt: skip
    ratios = []
    async with AsyncExitStack() as closing:
        settings["MILVUS_URI"] = closing.enter_context(milvus())
        plant = await closing.enter_async_context(stack(tmp_path, settings, per_category=112, agents=1))
        bare = await bare_inspector(closing, tmp_path, plant)
        done = 0
        for round_number in range(ROUNDS + 1):
            # Each part once: a second time its prompts would lie in the prefix cache.
            parts = plant.parts[done : done + (EPISODES if round_number else WARM_UP)]
            done += len(parts)
            loop_rate = await rate(run_bare(bare, plant, parts), len(parts))
            pipeline_rate = await rate(run_pipeline(plant, parts, done), len(parts))
            if round_number:
                ratios.append(pipeline_rate / loop_rate)
                print(f"\nbare {loop_rate:.1f} episodes/s, pipeline {pipeline_rate:.1f}, ratio {ratios[-1]:.2f}")
    print(f"pipeline / bare loop: {sorted(ratios)[len(ratios) // 2]:.2f} (median of {ROUNDS}; goal 0.9)")


async def bare_inspector(closing: AsyncExitStack, folder: Path, plant: Stack) -> Inspector:
    images: dict[str, Any] = {"image_roots": (str(folder),), "image_store": str(folder / "bare"), "data_dir": folder}
    policy, zoom, retrieval = [
        Direct((await closing.enter_async_context(hosted))[1])
        for hosted in (
            policy_service.hosted(PolicySettings(**images, torch_threads=1, engine_host="in_process")),
            zoom_service.hosted(ZoomSettings(**images)),
            retrieval_service.hosted(RetrievalSettings(**images, milvus_uri=str(folder / "bare.db"))),
        )
    ]
    for category in {sample.category for sample in plant.normals}:
        references = [plant.images.describe(s.image) for s in plant.normals if s.category == category]
        await retrieval.AddExemplars(retrieval_pb2.AddExemplarsRequest(category=category, images=references))
    agent = AgentSettings()
    return Inspector(Runner(policy, zoom, retrieval), agent.limits(), agent.rule())


async def rate(work: Any, count: int) -> float:
    started = time.perf_counter()
    await work
    return count / (time.perf_counter() - started)


async def run_bare(bare: Inspector, plant: Stack, parts: list[Sample]) -> None:
    places = asyncio.Semaphore(AT_ONCE)

    async def on_turn(_: Any) -> None:
        pass

    async def one(part: Sample) -> None:
        async with places:
            captured = events_pb2.ImageCaptured(event_id=uuid.uuid4().hex, line="L", category=part.category)
            captured.image.CopyFrom(await asyncio.to_thread(plant.images.describe, part.image))
            await bare.inspect(captured, on_turn)

    await asyncio.gather(*map(one, parts))


async def run_pipeline(plant: Stack, parts: list[Sample], total: int) -> None:
    """From the first publish to the last verdict, when `total` events have been published since the start."""
    await asyncio.gather(
        *(
            publish_image(plant.bus, plant.images, part.image, f"L{i % 6}", part.category)
            for i, part in enumerate(parts)
        )
    )
    await plant.inspections(total)
