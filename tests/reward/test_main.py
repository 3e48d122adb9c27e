"""Reward as a process: starts, scores, dies between the members of a group, is followed by another, obeys SIGTERM."""

from __future__ import annotations

import asyncio
import os
import uuid
from pathlib import Path

from redis.asyncio import Redis

from agentiad.v1 import events_pb2, reward_pb2
from agentiad.v1.reward_pb2_grpc import RewardServiceStub
from services.chassis import rpc, topics
from services.chassis.bus.sqlite import SqliteBus
from services.cli.processes import ready, service
from tests.chassis.bus.stores import PATIENCE_S
from tests.reward import plant
from tests.reward.trajectories import make_completed


async def test_a_group_outlives_the_process_that_took_its_first_members(tmp_path: Path, redis_url: str) -> None:
    group_id = uuid.uuid4().hex
    group = [make_completed(group_id, number, 3, preset="paper") for number in range(3)]
    environment = {**os.environ, "DATA_DIR": str(tmp_path), "REDIS_URL": redis_url}
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(topics.TOPICS)
    async with service("reward", f"unix://{tmp_path}/first.sock", environment) as first:
        await plant.publish(bus, group[2], group[0])
        await recorded(redis_url, group_id, members=2)
        first.process.kill()
        await first.process.wait()
    await plant.publish(bus, group[1])
    address = f"unix://{tmp_path}/second.sock"
    async with service("reward", address, environment) as second:
        events = plant.by_id(await plant.read(bus, topics.SCORED_TRAJECTORIES, [group_id], 3))
        # The bytes are those that this process makes.
        assert [event.value for event in events] == plant.expected(group)
        await ready(second, address, asyncio.Event())
        async with rpc.channel(address) as channel:
            request = reward_pb2.ScoreRequest(
                trajectories=[member.trajectory for member in group],
                ground_truth=group[0].ground_truth,
                preset="paper",
            )
            answer = await RewardServiceStub(channel).Score(request)
        scored = [events_pb2.TrajectoryScored.FromString(event.value) for event in events]
        assert list(answer.rewards) == [each.reward for each in scored]
        second.process.terminate()
        assert await second.process.wait() == 0
    await bus.close()


async def recorded(redis_url: str, group_id: str, members: int) -> None:
    """Returns when Redis holds so many members: two fields each, beside the terms."""
    async with Redis.from_url(redis_url) as redis, asyncio.timeout(PATIENCE_S):
        while await redis.hlen(f"agentiad:group:{group_id}") < 1 + 2 * members:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
