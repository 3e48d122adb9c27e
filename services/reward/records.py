"""Where the members of unfinished groups wait for each other: a Redis hash a group.

Invariants: the first record of a member holds, so that a group is scored alike whenever it is; what is recorded comes
with its expiry in one transaction.
"""

from __future__ import annotations

from dataclasses import dataclass

from redis.asyncio import Redis

from services.chassis.redis_outages import transient

# Since the group's last member came. Longer than an event may wait in the retry topic (12 hours) and than a weekend in
# which no agent runs; trajectories are too large to be kept for longer. A group that is older begins anew.
GROUP_TTL_S = 3 * 24 * 3600
_TERMS = "terms"


@dataclass(frozen=True)
class Member:
    """value: its event's body. traceparent: its event's, "" if none."""

    value: bytes
    traceparent: str


class Records:
    """Raises Transient while Redis cannot be reached or takes nothing."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    async def agree(self, group_id: str, terms: bytes) -> bytes:
        """Records the group's terms unless there are some; returns those that hold."""
        key = _key(group_id)
        with transient():
            async with self._redis.pipeline() as pipe:
                pipe.hsetnx(key, _TERMS, terms)
                pipe.expire(key, GROUP_TTL_S)
                pipe.hget(key, _TERMS)
                *_, agreed = await pipe.execute()
        assert isinstance(agreed, bytes), "the connection must not decode"
        return agreed

    async def add(self, group_id: str, number: int, size: int, member: Member) -> list[Member]:
        """Records member `number` of `size` unless there is one; returns all once they are there, by their numbers, and
        none until then."""
        key = _key(group_id)
        body, trace = _fields(number)
        with transient():
            async with self._redis.pipeline() as pipe:
                pipe.hsetnx(key, body, member.value)
                pipe.hsetnx(key, trace, member.traceparent.encode("utf-8", "surrogateescape"))
                pipe.expire(key, GROUP_TTL_S)
                pipe.hlen(key)
                *_, recorded = await pipe.execute()
            if recorded < 1 + 2 * size:
                return []
            values = await self._redis.hmget(key, [field for n in range(size) for field in _fields(n)])
        return [_member(value, trace) for value, trace in zip(values[::2], values[1::2], strict=True)]


def _member(value: bytes | str | None, traceparent: bytes | str | None) -> Member:
    assert isinstance(value, bytes), "the connection must not decode"
    assert isinstance(traceparent, bytes), "both are recorded in one transaction"
    return Member(value, traceparent.decode("utf-8", "surrogateescape"))


def _key(group_id: str) -> str:
    return f"agentiad:group:{group_id}"


def _fields(number: int) -> tuple[str, str]:
    """Of a member's body and its traceparent."""
    return str(number), f"{number}:traceparent"
