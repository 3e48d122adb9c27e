"""What the agent remembers of an event in Redis: the steps of an unfinished episode, the one result of a finished one.

Invariant: the first result that is recorded for an event is the event's result for ever after (until it expires, long
after the topic's own retention); every copy that is published is byte by byte that one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from redis.asyncio import Redis

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent.runner import OnTurn
from services.chassis.redis_outages import transient

# An episode lasts seconds; steps are of use only until the event is delivered again.
STEPS_TTL_S = 24 * 3600
# Of an inspection: longer than Kafka keeps a topic by default (7 days), so that no redelivery finds its result gone.
RESULT_TTL_S = 14 * 24 * 3600
# Of a rollout: its trainer waits for minutes. At ten trajectories a second of 10 KB each this is 360 MB.
ROLLOUT_TTL_S = 3600


R = TypeVar("R", events_pb2.InspectionCompleted, events_pb2.TrajectoryCompleted)


class Records(Generic[R]):
    """Of events whose results are of the type `result_type`; ids are told apart by it.

    Raises Transient while Redis cannot be reached or takes nothing.
    """

    def __init__(self, redis: Redis, result_type: type[R], ttl_s: int) -> None:
        self._redis, self._ttl_s = redis, ttl_s
        self._result_type: type[R] = result_type
        self._prefix = f"agentiad:{result_type.DESCRIPTOR.name}"

    async def once(self, event_id: str, play: Callable[[pb.Trajectory | None, OnTurn], Awaitable[R]]) -> R:
        """The event's one result: the recorded one, or what `play` makes, going on from the recorded steps (None: there
        are none) and telling of each further one.
        """
        recorded = await self.result(event_id)
        if recorded is not None:
            return recorded

        async def save(trajectory: pb.Trajectory) -> None:
            if not trajectory.stop_reason:
                await self.save_steps(event_id, trajectory)

        return await self.claim_result(await play(await self.steps(event_id), save))

    async def result(self, event_id: str) -> R | None:
        value = await self._get(self._result_key(event_id))
        return None if value is None else self._result_type.FromString(value)

    async def claim_result(self, result: R) -> R:
        """Records the result unless there is one already; returns the one that holds."""
        key = self._result_key(result.event_id)
        with transient():
            first = await self._redis.set(key, result.SerializeToString(), nx=True, ex=self._ttl_s)
            await self._redis.delete(self._steps_key(result.event_id))
        return result if first else await self.result(result.event_id) or result

    async def steps(self, event_id: str) -> pb.Trajectory | None:
        value = await self._get(self._steps_key(event_id))
        return None if value is None else pb.Trajectory.FromString(value)

    async def save_steps(self, event_id: str, trajectory: pb.Trajectory) -> None:
        with transient():
            await self._redis.set(self._steps_key(event_id), trajectory.SerializeToString(), ex=STEPS_TTL_S)

    async def _get(self, key: str) -> bytes | None:
        with transient():
            value = await self._redis.get(key)
        assert not isinstance(value, str), "the connection must not decode"
        return value

    def _steps_key(self, event_id: str) -> str:
        return f"{self._prefix}:steps:{event_id}"

    def _result_key(self, event_id: str) -> str:
        return f"{self._prefix}:result:{event_id}"
