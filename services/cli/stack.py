"""The embedded stack: the servicers of every service in this process, called through their stubs by a unix socket."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from agentiad.v1 import retrieval_pb2
from agentiad.v1.agent_pb2_grpc import AgentServiceStub
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.chassis import rpc
from services.chassis.images import ImageStore

if TYPE_CHECKING:
    # These exist for the type checker only.
    from agentiad.v1.agent_pb2_grpc import AgentServiceAsyncStub
    from agentiad.v1.policy_pb2_grpc import PolicyServiceAsyncStub
    from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceAsyncStub
    from agentiad.v1.zoom_pb2_grpc import ZoomServiceAsyncStub


@dataclass(frozen=True)
class Stack:
    """`images` reads and writes what the hosted services read and write."""

    agent: AgentServiceAsyncStub
    policy: PolicyServiceAsyncStub
    zoom: ZoomServiceAsyncStub
    retrieval: RetrievalServiceAsyncStub
    images: ImageStore


@asynccontextmanager
async def embedded(
    data_dir: Path,
    image_roots: Sequence[Path],
    model: Path | None,
    library: Path | None = None,
    category: str | None = None,
) -> AsyncIterator[Stack]:
    """Hosts policy, zoom, retrieval and agent until the block ends.

    `data_dir` keeps the images that zoom draws. `library`: a folder for exemplars of this stack's own, whatever
    MILVUS_URI says; None: the library that the environment names, by default the one in data_dir. `model`: a checkpoint
    folder; None: pocket. `category`: the folders that its exemplars lie in are allowed roots, too.
    """
    from services.agent import inspector
    from services.agent import service as agent_service
    from services.agent.settings import AgentSettings
    from services.policy import service as policy_service
    from services.policy.settings import PolicySettings
    from services.retrieval import service as retrieval_service
    from services.retrieval.settings import RetrievalSettings
    from services.zoom import service as zoom_service
    from services.zoom.settings import ZoomSettings

    roots = tuple(str(root) for root in image_roots)
    store = str(data_dir / "images")
    chosen: dict[str, Any] = {} if model is None else {"checkpoint": str(model)}
    own: dict[str, Any] = {}
    if library is not None:
        own = {"milvus_uri": str(library / "exemplars.db"), "milvus_token": ""}
    async with AsyncExitStack() as closing:
        # A short path: unix sockets allow about 100 characters.
        folder = closing.enter_context(tempfile.TemporaryDirectory(prefix="agentiad-"))
        address, library_address = f"unix://{folder}/stack.sock", f"unix://{folder}/library.sock"
        images: dict[str, Any] = {"image_roots": roots, "image_store": store, "data_dir": data_dir}
        # Before the others, whose roots it is asked for.
        exemplars = await closing.enter_async_context(retrieval_service.hosted(RetrievalSettings(**{**images, **own})))
        await closing.enter_async_context(rpc.serve(library_address, [exemplars]))
        library_channel: grpc.aio.Channel = await closing.enter_async_context(rpc.channel(library_address))
        retrieval = RetrievalServiceStub(library_channel)
        if category is not None:
            images["image_roots"] = roots = (*roots, *await _exemplar_folders(retrieval, category))
        tools = [
            await closing.enter_async_context(hosted)
            for hosted in (
                policy_service.hosted(PolicySettings(**images, **chosen)),
                zoom_service.hosted(ZoomSettings(**images)),
            )
        ]
        settings = AgentSettings(policy_address=address, zoom_address=address, retrieval_address=library_address)
        connected = await closing.enter_async_context(inspector.connected(settings))
        await closing.enter_async_context(rpc.serve(address, [*tools, agent_service.servicer(connected)]))
        channel: grpc.aio.Channel = await closing.enter_async_context(rpc.channel(address))
        yield Stack(
            AgentServiceStub(channel),
            PolicyServiceStub(channel),
            ZoomServiceStub(channel),
            retrieval,
            ImageStore(roots, store),
        )


async def every_exemplar(retrieval: RetrievalServiceAsyncStub, category: str) -> AsyncIterator[retrieval_pb2.Exemplar]:
    """The library's, page after page; of all categories where none is given."""
    token = ""
    while True:
        request = retrieval_pb2.ListExemplarsRequest(category=category, page_size=1000, page_token=token)
        page = await retrieval.ListExemplars(request)
        for exemplar in page.exemplars:
            yield exemplar
        token = page.next_page_token
        if not token:
            return


async def _exemplar_folders(retrieval: RetrievalServiceAsyncStub, category: str) -> list[str]:
    """URIs of the folders."""
    return sorted(
        {exemplar.image.uri.rpartition("/")[0] + "/" async for exemplar in every_exemplar(retrieval, category)}
    )
