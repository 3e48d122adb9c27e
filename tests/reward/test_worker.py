"""Trajectories in, scored trajectories out, over real buses and a real Redis."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

import pytest
from redis.asyncio import Redis

from agentiad.v1 import events_pb2
from services.chassis import topics
from services.chassis.bus import Bus
from services.chassis.bus.failures import REASON, RetryPolicy
from services.chassis.bus.kafka import KafkaBus
from services.chassis.bus.sqlite import SqliteBus
from services.reward import worker
from tests.reward import plant
from tests.reward.trajectories import make_completed, make_truth

SCORED, DLQ = topics.SCORED_TRAJECTORIES, topics.dlq(topics.TRAJECTORIES)


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[SqliteBus]:
    made = SqliteBus(tmp_path / "bus.db", lease_s=2.0, grace_s=1.0)
    await made.ensure_topics(topics.TOPICS)
    yield made
    await made.close()


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
async def any_bus(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Bus]:
    made: Bus = SqliteBus(tmp_path / "bus.db")
    if request.param == "kafka":
        made = KafkaBus(request.getfixturevalue("kafka"))
    await made.ensure_topics(topics.TOPICS)
    yield made
    await made.close()


def make_group(size: int = 3, preset: str = "paper") -> list[events_pb2.TrajectoryCompleted]:
    """A group of its own name; the preset looks at the whole group."""
    group_id = uuid.uuid4().hex
    return [make_completed(group_id, number, size, preset=preset) for number in range(size)]


async def test_each_group_is_scored_once_it_is_whole(any_bus: Bus, redis_url: str) -> None:
    """Two groups whose members come interleaved and in no order, and one that never becomes whole."""
    one, two, never = make_group(), make_group(2), make_group(4)
    await plant.publish(any_bus, one[2], never[0], two[1], one[0], never[1], never[3], one[1], two[0])
    async with plant.working(any_bus, redis_url):
        keys = [group[0].group_id for group in (one, two, never)]
        events = plant.by_id(await plant.read(any_bus, SCORED, keys, 5))
    for group in (one, two):
        found = [event for event in events if event.key == group[0].group_id]
        assert [event.value for event in found] == plant.expected(group)
        for event, member in zip(found, group, strict=True):
            assert event.headers == {
                "ce_id": f"{member.group_id}/{member.member}",
                "ce_source": worker.SOURCE,
                "ce_type": "agentiad.v1.TrajectoryScored",
                "ce_specversion": "1.0",
                "ce_time": f"2027-01-15T08:00:0{member.member}Z",
                "content-type": "application/protobuf",
                "traceparent": plant.trace_of(member),
            }


async def test_a_member_that_comes_again_publishes_its_group_again(bus: SqliteBus, redis_url: str) -> None:
    """Even if it comes in another form: the first record holds."""
    group = make_group()
    again = events_pb2.TrajectoryCompleted.FromString(group[1].SerializeToString())
    again.trajectory.verdict.anomaly_present = True
    async with plant.working(bus, redis_url):
        await plant.publish(bus, group[0], group[0], group[1], group[2])
        first = plant.by_id(await plant.read(bus, SCORED, [group[0].group_id], 3))
        await plant.publish(bus, again)
        events = await plant.read(bus, SCORED, [group[0].group_id], 6)
    copies = plant.by_id(events[3:])
    assert [(event.value, event.headers) for event in copies] == [(event.value, event.headers) for event in first]
    assert [event.value for event in first] == plant.expected(group)


async def test_what_cannot_be_scored_goes_to_the_dlq_with_the_reason(bus: SqliteBus, redis_url: str) -> None:
    group = make_group()
    key = group[0].group_id
    wrong_preset = make_completed(key, 1, 3, preset="best")
    other_preset = make_completed(key, 1, 3, preset="gated")
    other_truth = make_completed(key, 2, 3, truth=make_truth(anomalous=False), preset="paper")
    beyond = make_completed(key, 3, 3, preset="paper")
    async with plant.working(bus, redis_url):
        await plant.publish_body(bus, key, b"\xff\xff\xff")
        await plant.publish_body(bus, key, group[0].SerializeToString(), type_name="agentiad.v1.ImageCaptured")
        await bus.publish(topics.TRAJECTORIES, key, group[0].SerializeToString(), {})
        await plant.publish(bus, group[0], wrong_preset, other_preset, other_truth, beyond, group[1], group[2])
        letters = await plant.read(bus, DLQ, [key], 7)
        events = plant.by_id(await plant.read(bus, SCORED, [key], 3))
    reasons = sorted(event.headers[REASON] for event in letters)
    assert reasons == sorted(
        [
            "the body is not an agentiad.v1.TrajectoryCompleted",
            "ce_type 'agentiad.v1.ImageCaptured', expected agentiad.v1.TrajectoryCompleted",
            "not a CloudEvent: header ce_id, ce_source, ce_type, ce_specversion missing",
            "reward_preset: there is no reward preset 'best', only gated, paper-as-run, paper",
            f"member 1 differs from its group '{key}' in reward_preset",
            f"member 2 differs from its group '{key}' in ground_truth",
            "member 3 must be below group_size 3",
        ]
    )
    assert [event.value for event in events] == plant.expected(group)


class CrashError(Exception):
    pass


class CrashingBus(SqliteBus):
    """Takes one scored trajectory, then the process dies."""

    async def publish(self, topic: str, key: str, value: bytes, headers: Mapping[str, str]) -> None:
        if headers["ce_id"].endswith("/1"):
            raise CrashError
        await super().publish(topic, key, value, headers)


async def test_after_a_crash_between_two_members_another_worker_takes_over(
    bus: SqliteBus, tmp_path: Path, redis_url: str
) -> None:
    group = make_group(2)
    await plant.publish(bus, *group)
    crashing = CrashingBus(tmp_path / "bus.db", lease_s=2.0, grace_s=1.0)
    with pytest.raises(CrashError):
        async with plant.working(crashing, redis_url) as task:
            await asyncio.wait([task])
    await crashing.close()
    before = await plant.read(bus, SCORED, [group[0].group_id], 1)
    async with plant.working(bus, redis_url):
        events = await plant.read(bus, SCORED, [group[0].group_id], 3)
    assert before == events[:1]
    assert [event.value for event in plant.by_id(events[1:])] == plant.expected(group)
    assert before[0] == plant.by_id(events)[0]


async def test_members_wait_while_redis_takes_nothing(tmp_path: Path, redis_url: str) -> None:
    patient = RetryPolicy(in_place=1, retry_delay_s=0.2, max_delay_s=0.2)
    bus, group = SqliteBus(tmp_path / "bus.db", retry_policy=patient), make_group()
    key = group[0].group_id
    await bus.ensure_topics(topics.TOPICS)
    async with Redis.from_url(redis_url) as redis, plant.working(bus, redis_url):
        await redis.config_set("maxmemory", 1)
        try:
            await plant.publish(bus, *group)
            waiting = await plant.read(bus, topics.retry(topics.TRAJECTORIES), [key], 3)
        finally:
            await redis.config_set("maxmemory", 0)
        events = plant.by_id(await plant.read(bus, SCORED, [key], 3))
    await bus.close()
    assert all(event.headers[REASON].startswith("Redis: ") for event in waiting)
    assert [event.value for event in events] == plant.expected(group)
    assert [event.headers["traceparent"] for event in events] == [plant.trace_of(member) for member in group]
