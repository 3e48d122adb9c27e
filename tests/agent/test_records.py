"""What a crash may not change, on a real Redis."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent.inspection import DecisionRule
from services.agent.inspector import Inspector, connected, inspect_once
from services.agent.records import RESULT_TTL_S, Records
from services.agent.runner import Runner
from services.agent.settings import AgentSettings
from services.chassis.errors import Transient
from services.cli.stack import Stack
from services.data.readers import Sample

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(loop_scope="module")
async def records(redis_url: str) -> AsyncIterator[Records[events_pb2.InspectionCompleted]]:
    async with Redis.from_url(redis_url) as redis:
        yield Records(redis, events_pb2.InspectionCompleted, RESULT_TTL_S)


def make_inspection(event_id: str, score: float) -> events_pb2.InspectionCompleted:
    return events_pb2.InspectionCompleted(event_id=event_id, raw_score=score)


async def test_the_first_result_holds(records: Records[events_pb2.InspectionCompleted]) -> None:
    event_id = uuid.uuid4().hex
    assert await records.result(event_id) is None
    first, second = make_inspection(event_id, 0.1), make_inspection(event_id, 0.9)
    assert await records.claim_result(first) == first
    assert await records.claim_result(second) == first
    assert await records.result(event_id) == first


async def test_steps_are_kept_until_the_result(records: Records[events_pb2.InspectionCompleted]) -> None:
    event_id = uuid.uuid4().hex
    assert await records.steps(event_id) is None
    trajectory = pb.Trajectory(episode_id=event_id, turns=[pb.Turn()])
    await records.save_steps(event_id, trajectory)
    assert await records.steps(event_id) == trajectory
    await records.claim_result(make_inspection(event_id, 0.5))
    assert await records.steps(event_id) is None


async def test_without_redis_the_event_waits() -> None:
    async with Redis.from_url("redis://127.0.0.1:1/0", socket_connect_timeout=1) as redis:
        records = Records(redis, events_pb2.InspectionCompleted, RESULT_TTL_S)
        for work in (
            records.result("e"),
            records.steps("e"),
            records.save_steps("e", pb.Trajectory()),
            records.claim_result(make_inspection("e", 0.5)),
        ):
            with pytest.raises(Transient, match="Redis"):
                await work


async def test_a_full_redis_makes_the_event_wait(
    redis_url: str, records: Records[events_pb2.InspectionCompleted]
) -> None:
    async with Redis.from_url(redis_url) as redis:
        await redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(Transient, match="memory"):
                await records.save_steps("e", pb.Trajectory())
        finally:
            await redis.config_set("maxmemory", 0)


async def test_a_budget_ends_in_a_provisional_verdict_when_no_policy_is_there(tmp_path: Path) -> None:
    nowhere = f"unix:{tmp_path}/nobody"
    settings = AgentSettings(policy_address=nowhere, zoom_address=nowhere, retrieval_address=nowhere)
    captured = events_pb2.ImageCaptured(event_id="e", line="L1", category="bolt")
    captured.captured_at.GetCurrentTime()

    async def no_turn(trajectory: pb.Trajectory) -> None:
        raise AssertionError("nobody answered")

    async with connected(settings) as inspector:
        with pytest.raises(Transient):
            await inspector.inspect(captured, no_turn)
        captured.latency_budget.FromMilliseconds(500)
        captured.captured_at.GetCurrentTime()
        done = await inspector.inspect(captured, no_turn)
    assert done.decision == events_pb2.DECISION_REVIEW
    assert done.trajectory.stop_reason == pb.STOP_REASON_LATENCY_BUDGET
    assert done.trajectory.task.category == "bolt"


class CrashError(Exception):
    pass


class CrashingRecords(Records[events_pb2.InspectionCompleted]):
    """Redis takes the step, then the agent dies."""

    async def save_steps(self, event_id: str, trajectory: pb.Trajectory) -> None:
        await super().save_steps(event_id, trajectory)
        raise CrashError


async def test_an_episode_goes_on_where_it_was(stack: Stack, part: Sample, redis_url: str) -> None:
    inspector = Inspector(
        Runner(stack.policy, stack.zoom, stack.retrieval), AgentSettings().limits(), DecisionRule(0.5, 0)
    )
    captured = events_pb2.ImageCaptured(
        event_id=uuid.uuid4().hex, line="L1", category=part.category, image=stack.images.describe(part.image)
    )
    async with Redis.from_url(redis_url) as redis:
        with pytest.raises(CrashError):
            await inspect_once(
                inspector, CrashingRecords(redis, events_pb2.InspectionCompleted, RESULT_TTL_S), captured
            )
        records = Records(redis, events_pb2.InspectionCompleted, RESULT_TTL_S)
        before = await records.steps(captured.event_id)
        assert before is not None
        result = await inspect_once(inspector, records, captured)
        # The turns before the crash are the very same ones, latencies included: nothing was done twice.
        assert list(result.trajectory.turns[: len(before.turns)]) == list(before.turns)
        assert await inspect_once(inspector, records, captured) == result
