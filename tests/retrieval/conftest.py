"""Libraries in the process and on a real server, and a retrieval service over one."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from pymilvus import MilvusClient

from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub, add_RetrievalServiceServicer_to_server
from services.chassis import rpc
from services.chassis.images import ImageStore
from services.retrieval.catalogue import Catalogue
from services.retrieval.embedding import Embedder
from services.retrieval.library import COLLECTION, GRPC_OPTIONS, ExemplarLibrary
from services.retrieval.service import RetrievalService
from tests.retrieval.exemplars import MeanColours


@pytest.fixture(params=["embedded", "server"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place for a library."""
    if request.param == "embedded":
        return str(tmp_path / "library.db")
    server: str = request.getfixturevalue("milvus_uri")
    client = MilvusClient(uri=server, timeout=10, grpc_options=GRPC_OPTIONS)
    client.drop_collection(COLLECTION)
    client.close()
    return server


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    """What the service reads."""
    return ImageStore([], str(tmp_path / "images"))


@pytest_asyncio.fixture
async def retrieval(uri: str, store: ImageStore, tmp_path: Path) -> AsyncIterator[RetrievalServiceStub]:
    encoder = MeanColours()
    library = ExemplarLibrary(uri, encoder.name, encoder.dimension)
    address = f"unix://{tmp_path}/retrieval.sock"
    name = "agentiad.v1.RetrievalService"
    async with Embedder(encoder) as embedder:
        service = RetrievalService(Catalogue(store, embedder, library))
        servicer = (add_RetrievalServiceServicer_to_server, service, name)
        async with rpc.serve(address, [servicer]), rpc.channel(address) as channel:
            yield RetrievalServiceStub(channel)
    library.close()
