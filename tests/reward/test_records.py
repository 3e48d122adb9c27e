"""Groups on a real Redis: what holds, and what a Redis that is away or full does."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator

import pytest
from redis.asyncio import Redis

from services.chassis.errors import Transient
from services.reward.records import GROUP_TTL_S, Member, Records


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def records(redis: Redis) -> Records:
    return Records(redis)


def make_member(number: int) -> Member:
    return Member(b"value %d\x00\xff" % number, f"00-trace-{number}\udcff")


async def test_the_first_terms_hold(records: Records) -> None:
    group_id = uuid.uuid4().hex
    assert await records.agree(group_id, b"first") == b"first"
    assert await records.agree(group_id, b"second") == b"first"
    assert await records.agree(uuid.uuid4().hex, b"second") == b"second"


async def test_members_wait_until_all_are_there(records: Records) -> None:
    group_id, members = uuid.uuid4().hex, [make_member(number) for number in range(3)]
    await records.agree(group_id, b"terms")
    for number, expected in [(2, []), (0, []), (2, []), (1, members), (0, members)]:
        assert await records.add(group_id, number, 3, members[number]) == expected


async def test_the_first_record_of_a_member_holds(records: Records) -> None:
    group_id = uuid.uuid4().hex
    await records.agree(group_id, b"terms")
    assert await records.add(group_id, 0, 1, make_member(0)) == [make_member(0)]
    assert await records.add(group_id, 0, 1, Member(b"another", "")) == [make_member(0)]


async def test_one_of_those_that_come_at_once_finds_the_group_whole(records: Records) -> None:
    group_id, members = uuid.uuid4().hex, [make_member(number) for number in range(40)]
    await records.agree(group_id, b"terms")
    found = await asyncio.gather(*(records.add(group_id, n, 40, member) for n, member in enumerate(members)))
    assert members in found
    assert all(each in ([], members) for each in found)


async def test_a_group_expires(redis: Redis, records: Records) -> None:
    group_id = uuid.uuid4().hex
    key = f"agentiad:group:{group_id}"
    await records.agree(group_id, b"terms")
    assert GROUP_TTL_S - 60 < await redis.ttl(key) <= GROUP_TTL_S
    await redis.expire(key, 100)
    await records.add(group_id, 0, 2, make_member(0))
    assert GROUP_TTL_S - 60 < await redis.ttl(key) <= GROUP_TTL_S


async def test_without_redis_the_event_waits() -> None:
    async with Redis.from_url("redis://127.0.0.1:1/0", socket_connect_timeout=1) as nowhere:
        records = Records(nowhere)
        for work in (records.agree("g", b"terms"), records.add("g", 0, 1, make_member(0))):
            with pytest.raises(Transient, match="Redis"):
                await work


async def test_a_full_redis_makes_the_event_wait(redis: Redis, records: Records) -> None:
    await redis.config_set("maxmemory", 1)
    try:
        for work in (records.agree("g", b"terms"), records.add("g", 0, 1, make_member(0))):
            with pytest.raises(Transient, match="memory"):
                await work
    finally:
        await redis.config_set("maxmemory", 0)
