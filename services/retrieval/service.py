"""The edge of retrieval: from messages to the catalogue and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc

from agentiad.v1 import retrieval_pb2 as pb
from agentiad.v1 import retrieval_pb2_grpc
from services.chassis.images import make_image_store
from services.chassis.rpc import Servicer
from services.retrieval.catalogue import Catalogue
from services.retrieval.embedding import Embedder, Encoder
from services.retrieval.library import Entry, ExemplarLibrary, LibraryError
from services.retrieval.settings import RetrievalSettings

Context = grpc.aio.ServicerContext[Any, Any]


class RetrievalService(retrieval_pb2_grpc.RetrievalServiceServicer):
    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue

    async def AddExemplars(self, request: pb.AddExemplarsRequest, context: Context) -> pb.AddExemplarsResponse:  # noqa: N802
        return pb.AddExemplarsResponse(added=await self._catalogue.add(request.category, request.images))

    async def QueryExemplars(self, request: pb.QueryExemplarsRequest, context: Context) -> pb.QueryExemplarsResponse:  # noqa: N802
        found = await self._catalogue.nearest(request.image, request.category, request.limit)
        return pb.QueryExemplarsResponse(exemplars=map(_exemplar, found))

    async def ListExemplars(self, request: pb.ListExemplarsRequest, context: Context) -> pb.ListExemplarsResponse:  # noqa: N802
        entries, token = await self._catalogue.page(request.category, request.page_size, request.page_token)
        return pb.ListExemplarsResponse(exemplars=map(_exemplar, entries), next_page_token=token)

    async def DeleteExemplars(self, request: pb.DeleteExemplarsRequest, context: Context) -> pb.DeleteExemplarsResponse:  # noqa: N802
        return pb.DeleteExemplarsResponse(deleted=await self._catalogue.remove(request.category, request.sha256))


@asynccontextmanager
async def hosted(settings: RetrievalSettings) -> AsyncIterator[Servicer]:
    """What `rpc.serve` takes. Raises LibraryError when the encoder or the library cannot be used as configured."""
    encoder, name, dimension = await asyncio.to_thread(_load_encoder, settings.encoder)
    token = settings.milvus_token.get_secret_value()
    library = await asyncio.to_thread(ExemplarLibrary, settings.milvus_uri, name, dimension, token)
    try:
        async with Embedder(encoder, settings.max_queued) as embedder:
            service = RetrievalService(Catalogue(make_image_store(settings), embedder, library))
            full_name = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
            yield retrieval_pb2_grpc.add_RetrievalServiceServicer_to_server, service, full_name
    finally:
        await asyncio.to_thread(library.close)


def _load_encoder(path: Path) -> tuple[Encoder, str, int]:
    """The encoder, the name that tells its vectors from others', and their length."""
    from PIL import Image

    from services.vlm.checkpoint import sha256_of
    from services.vlm.encoder import VisionEncoder

    try:
        name = f"{path.resolve().name}-{sha256_of(path)[:12]}"
        encoder = VisionEncoder(path)
    except (OSError, ValueError) as error:
        raise LibraryError(f"ENCODER {path} cannot be used: {error}") from error
    return encoder, name, int(encoder.embed([Image.new("RGB", (224, 224))]).shape[1])


def _exemplar(entry: Entry) -> pb.Exemplar:
    return pb.Exemplar(image=entry.image, category=entry.category, similarity=entry.similarity)
