"""`agentiad exemplars …`: through the running stack's retrieval service, or one hosted here for the moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentiad.v1 import retrieval_pb2
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from services.agent.settings import AgentSettings
from services.chassis import rpc, telemetry
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.chassis.settings import load
from services.cli.inspect import console, make_progress
from services.cli.inspecting import find_images
from services.cli.stack import every_exemplar

if TYPE_CHECKING:
    # These exist for the type checker only.
    from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceAsyncStub

# Images a call: progress is seen, and a call stays well inside its deadline.
BATCH = 16


def add(paths: list[Path], category: str, data_dir: Path) -> int:
    """Exit status 1 if any picture could not be added."""
    return asyncio.run(_add(paths, category, data_dir))


async def _add(paths: list[Path], category: str, data_dir: Path) -> int:
    files = find_images(paths)
    roots = sorted({file.resolve().parent for file in files})
    store = ImageStore([str(root) for root in roots])
    added = failed = 0
    async with _retrieval(data_dir, roots) as retrieval:
        with make_progress(f"Adding to {category}", len(files)) as progress:
            for start in range(0, len(files), BATCH):
                images = []
                for file in files[start : start + BATCH]:
                    try:
                        images.append(await asyncio.to_thread(store.describe, file))
                    except BadInput as error:
                        failed += 1
                        console.print(f"[red]{error}[/red]")
                if images:
                    request = retrieval_pb2.AddExemplarsRequest(category=category, images=images)
                    added += (await retrieval.AddExemplars(request)).added
                progress.advance(progress.task_ids[0], len(files[start : start + BATCH]))
    console.print(f"{added} new exemplars in {category}, {len(files) - failed - added} were there before")
    return 1 if failed or not files else 0


def show(category: str, data_dir: Path) -> None:
    asyncio.run(_show(category, data_dir))


async def _show(category: str, data_dir: Path) -> None:
    async with _retrieval(data_dir, []) as retrieval:
        async for exemplar in every_exemplar(retrieval, category):
            image = exemplar.image
            print(exemplar.category, image.sha256, f"{image.width}x{image.height}", image.uri, sep="\t")


def remove(category: str, sha256: list[str], everything: bool, data_dir: Path) -> int:
    """Exit status 2 when it is not said what to remove."""
    if bool(sha256) == everything:
        console.print("Say which: the digests of the pictures, or --all.")
        return 2
    deleted = asyncio.run(_remove(category, sha256, data_dir))
    console.print(f"{deleted} exemplars removed from {category}")
    return 0


async def _remove(category: str, sha256: list[str], data_dir: Path) -> int:
    async with _retrieval(data_dir, []) as retrieval:
        request = retrieval_pb2.DeleteExemplarsRequest(category=category, sha256=sha256)
        return (await retrieval.DeleteExemplars(request)).deleted


@asynccontextmanager
async def _retrieval(data_dir: Path, roots: list[Path]) -> AsyncIterator[RetrievalServiceAsyncStub]:
    """The service at RETRIEVAL_ADDRESS where it answers, else one on the library in `data_dir`."""
    telemetry.configure("cli", "WARNING")
    address = load(AgentSettings).retrieval_address
    async with rpc.channel(address) as channel:
        if await _answers(channel):
            console.print(f"[dim]Library of the stack that runs here ({address})[/dim]")
            yield RetrievalServiceStub(channel)
            return
    from services.retrieval.service import hosted
    from services.retrieval.settings import RetrievalSettings

    settings = RetrievalSettings(data_dir=data_dir, image_roots=tuple(map(str, roots)))
    console.print(f"[dim]Library at {settings.milvus_uri}[/dim]")
    socket = f"unix://{data_dir.resolve()}/exemplars.sock"
    async with hosted(settings) as servicer, rpc.serve(socket, [servicer]), rpc.channel(socket) as channel:
        yield RetrievalServiceStub(channel)


async def _answers(channel: grpc.aio.Channel) -> bool:
    try:
        await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=1)
    except grpc.aio.AioRpcError:
        return False
    return True
