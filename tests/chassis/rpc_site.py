"""Two services whose methods do what a test says, behind real gRPC."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from agentiad.v1 import agent_pb2, agent_pb2_grpc, zoom_pb2, zoom_pb2_grpc
from services.chassis import rpc

ZOOM, AGENT = "agentiad.v1.ZoomService", "agentiad.v1.AgentService"
Behaviour = Callable[[], Awaitable[Any]]


class Zoom(zoom_pb2_grpc.ZoomServiceServicer):
    """Crop does what the test says."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.calls = 0

    async def Crop(self, request: zoom_pb2.CropRequest, context: Any) -> zoom_pb2.CropResponse:  # noqa: N802
        self.calls += 1
        await self.behaviour()
        return zoom_pb2.CropResponse()


class Agent(agent_pb2_grpc.AgentServiceServicer):
    """Inspect streams two responses and then does what the test says."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.calls = 0

    async def Inspect(self, request: agent_pb2.InspectRequest, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.calls += 1
        yield agent_pb2.InspectResponse()
        yield agent_pb2.InspectResponse()
        await self.behaviour()


class Site:
    """A server of both, and a channel to it."""

    def __init__(self, server: rpc.Server, channel: grpc.aio.Channel, zoom: Zoom, agent: Agent) -> None:
        self.server, self.channel, self.zoom, self.agent = server, channel, zoom, agent
        self.stub = zoom_pb2_grpc.ZoomServiceStub(channel)
        self.health = health_pb2_grpc.HealthStub(channel)

    async def crop(self, **options: Any) -> Any:
        return await self.stub.Crop(zoom_pb2.CropRequest(), **options)

    async def inspect(self, **options: Any) -> list[Any]:
        stub = agent_pb2_grpc.AgentServiceStub(self.channel)
        return [response async for response in stub.Inspect(agent_pb2.InspectRequest(), **options)]

    async def is_serving(self, name: str) -> bool:
        response = await self.health.Check(health_pb2.HealthCheckRequest(service=name))
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)


@asynccontextmanager
async def make_site(bind: str, behaviour: Behaviour, **options: Any) -> AsyncIterator[Site]:
    zoom, agent = Zoom(behaviour), Agent(behaviour)
    servicers: list[rpc.Servicer] = [
        (zoom_pb2_grpc.add_ZoomServiceServicer_to_server, zoom, ZOOM),
        (agent_pb2_grpc.add_AgentServiceServicer_to_server, agent, AGENT),
    ]
    async with rpc.serve(bind, servicers, **options) as server, rpc.channel(server.address) as channel:
        yield Site(server, channel, zoom, agent)


def raising(error: Exception) -> Behaviour:
    async def behave() -> None:
        raise error

    return behave


async def nothing() -> None:
    pass


async def outcome(call: Awaitable[Any]) -> Exception:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return rpc.from_rpc_error(raised.value)
