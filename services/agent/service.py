"""The edge of the agent for callers without Kafka."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from agentiad.v1 import agent_pb2, agent_pb2_grpc, events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import inspection
from services.agent.inspector import Inspector
from services.chassis import telemetry
from services.chassis.rpc import Servicer


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """A caller that goes away ends its episode."""

    def __init__(self, inspector: Inspector) -> None:
        self._inspector = inspector

    async def Inspect(  # noqa: N802
        self, request: agent_pb2.InspectRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[agent_pb2.InspectResponse]:
        inspection.check_captured(request.image)
        turns: asyncio.Queue[pb.Turn | None] = asyncio.Queue()
        limits = request.limits if request.HasField("limits") else None

        shown = 0

        async def on_turn(trajectory: pb.Trajectory) -> None:
            nonlocal shown
            for turn in trajectory.turns[shown:]:
                turns.put_nowait(turn)
            shown = len(trajectory.turns)

        async def inspect() -> events_pb2.InspectionCompleted:
            try:
                with telemetry.bind(event_id=request.image.event_id, episode_id=request.image.event_id):
                    return await self._inspector.inspect(request.image, on_turn, limits=limits)
            finally:
                turns.put_nowait(None)

        task = asyncio.create_task(inspect())
        try:
            while (turn := await turns.get()) is not None:
                yield agent_pb2.InspectResponse(turn=turn)
            yield agent_pb2.InspectResponse(inspection=await task)
        finally:
            task.cancel()


def servicer(inspector: Inspector) -> Servicer:
    """What `rpc.serve` takes."""
    return (
        agent_pb2_grpc.add_AgentServiceServicer_to_server,
        AgentService(inspector),
        agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name,
    )
