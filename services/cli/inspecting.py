"""Inspects files through an agent's Inspect call, many at once."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from agentiad.v1 import agent_pb2, events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput, Exhausted, Transient
from services.chassis.images import ImageStore
from services.chassis.rpc import deadline, from_rpc_error
from services.cli.rows import readable

if TYPE_CHECKING:
    # These exist for the type checker only.
    from agentiad.v1.agent_pb2_grpc import AgentServiceAsyncStub

# What a folder is searched for; a file that is named itself is always tried.
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})
# Enough for the policy to fill its batches.
AT_ONCE = 32
# Of one image, waiting for its place in the policy's batches included: a large model on a CPU takes minutes.
DEADLINE_S = 900


@dataclass(frozen=True)
class Item:
    """A file to inspect; `name` is how it is shown."""

    name: str
    path: Path
    category: str
    truth: pb.GroundTruth | None = None


@dataclass(frozen=True)
class Outcome:
    """An inspection, or why there is none."""

    item: Item
    inspection: events_pb2.InspectionCompleted | None = None
    error: str | None = None


def find_images(paths: Iterable[Path]) -> list[Path]:
    """The named files, and every image below the named folders, in the order of their names."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            found += sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        else:
            found.append(path)
    return found


async def inspect_all(
    agent: AgentServiceAsyncStub,
    store: ImageStore,
    items: Sequence[Item],
    on_done: Callable[[Outcome], None],
    limits: pb.Limits | None = None,
) -> list[Outcome]:
    """One outcome an item, in their order. A file that cannot be inspected is an outcome with its reason."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(item: Item) -> Outcome:
        async with places:
            try:
                outcome = Outcome(item, await _inspect(agent, store, item, limits))
            except (BadInput, Transient, Exhausted) as error:
                outcome = Outcome(item, error=str(error))
        on_done(outcome)
        return outcome

    return list(await asyncio.gather(*map(one, items)))


async def _inspect(
    agent: AgentServiceAsyncStub, store: ImageStore, item: Item, limits: pb.Limits | None
) -> events_pb2.InspectionCompleted:
    reference = await asyncio.to_thread(store.describe, item.path)
    captured = events_pb2.ImageCaptured(
        event_id=uuid.uuid4().hex, line="cli", category=item.category, image=reference, unit=readable(item.name)[:200]
    )
    captured.captured_at.GetCurrentTime()
    inspection = None
    try:
        with deadline(DEADLINE_S):
            async for step in agent.Inspect(agent_pb2.InspectRequest(image=captured, limits=limits)):
                if step.HasField("inspection"):
                    inspection = step.inspection
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error
    if inspection is None:
        raise Transient("the agent ended the call without a verdict")
    return inspection
