"""A zoom service on a unix socket, and the image store that it shares with its callers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.chassis import rpc
from services.chassis.images import ImageStore
from services.zoom.service import hosted
from services.zoom.settings import ZoomSettings


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore([], str(tmp_path / "images"))


@pytest_asyncio.fixture
async def zoom(tmp_path: Path) -> AsyncIterator[ZoomServiceStub]:
    address = f"unix://{tmp_path}/zoom.sock"
    settings = ZoomSettings(data_dir=tmp_path)
    async with hosted(settings) as servicer, rpc.serve(address, [servicer]), rpc.channel(address) as channel:
        yield ZoomServiceStub(channel)
