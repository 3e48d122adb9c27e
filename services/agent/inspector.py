"""One event to one inspection: the same path for the Kafka worker and for the Inspect call."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.agent import episode, inspection
from services.agent.records import Records
from services.agent.runner import OnTurn, Runner
from services.agent.settings import AgentSettings
from services.chassis import rpc
from services.chassis.errors import Exhausted, Transient

# A plant that waits for so long at most gets its provisional verdict in time: until then a service that is away is
# tried again right here. The bus brings events back after ten seconds at the earliest.
_LONG_BUDGET_S = 60.0
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Inspector:
    runner: Runner
    limits: pb.Limits
    rule: inspection.DecisionRule

    async def inspect(
        self,
        captured: events_pb2.ImageCaptured,
        on_turn: OnTurn,
        *,
        limits: pb.Limits | None = None,
        resume: pb.Trajectory | None = None,
    ) -> events_pb2.InspectionCompleted:
        """Runs the event's episode to its verdict, greedily, or until its latency budget runs out: also of one that
        cannot be begun, because a service is away.
        """
        trajectory = resume
        left = inspection.seconds_left(captured, datetime.now(UTC))
        try:
            async with asyncio.timeout(left) as budget:
                while True:
                    try:
                        if trajectory is None:
                            task = inspection.task_of(captured)
                            trajectory = await self.runner.begin(
                                captured.event_id, task, limits or self.limits, pb.Sampling()
                            )
                        await self.runner.run(trajectory, on_turn)
                        break
                    except (Transient, Exhausted):
                        if left is None or left > _LONG_BUDGET_S:
                            raise
                        await asyncio.sleep(_PAUSE_S)
        except TimeoutError:
            if not budget.expired():
                raise
            trajectory = trajectory or inspection.not_begun(captured, limits or self.limits)
            episode.out_of_time(trajectory)
            trajectory.ended_at.FromDatetime(datetime.now(UTC))
        return inspection.complete(captured, trajectory, self.rule, datetime.now(UTC))


@asynccontextmanager
async def connected(settings: AgentSettings) -> AsyncIterator[Inspector]:
    """An inspector with channels to the services that the settings name."""
    async with (
        rpc.channel(settings.policy_address) as policy,
        rpc.channel(settings.zoom_address) as zoom,
        rpc.channel(settings.retrieval_address) as retrieval,
    ):
        runner = Runner(PolicyServiceStub(policy), ZoomServiceStub(zoom), RetrievalServiceStub(retrieval))
        yield Inspector(runner, settings.limits(), settings.rule())


async def inspect_once(
    inspector: Inspector, records: Records[events_pb2.InspectionCompleted], captured: events_pb2.ImageCaptured
) -> events_pb2.InspectionCompleted:
    """The event's one result: the recorded one, or that of an episode which goes on from its recorded steps."""
    return await records.once(captured.event_id, lambda resume, save: inspector.inspect(captured, save, resume=resume))
