"""Taking over the versions that a trainer publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from agentiad.v1.events_pb2 import PolicyPublished
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis import telemetry
from services.chassis.bus import Bus
from services.chassis.errors import BadInput, Transient
from services.chassis.topics import POLICIES

# Between attempts to fetch a checkpoint from a store that cannot be reached.
_RETRY_S = 5.0
Load = Callable[[str, str, str], Awaitable[PolicyCard]]


async def follow(bus: Bus, policy: str, load: Load, stop: asyncio.Event) -> None:
    """Until `stop` is set: loads (checkpoint URI, sha256, version) of the newest event of `policy`.

    Every replica reads the whole topic, so that one that starts later has the same version as the others. Older
    events are skipped, unless the newer ones cannot be loaded.
    """
    pending: list[PolicyPublished] = []
    arrived = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(_load_newest(pending, arrived, load))
        async for event in bus.read(POLICIES, from_beginning=True, stop=stop):
            published = _parse(event.value)
            if published is not None and published.policy == policy:
                pending.append(published)
                arrived.set()
        loading.cancel()


async def _load_newest(pending: list[PolicyPublished], arrived: asyncio.Event, load: Load) -> None:
    while True:
        await arrived.wait()
        arrived.clear()
        while pending:
            published = pending.pop()
            try:
                await load(published.checkpoint_uri, published.sha256, published.version)
                pending.clear()
            except BadInput as error:
                telemetry.log.error("published policy is refused", version=published.version, reason=str(error))
            except Transient as error:
                telemetry.log.warning(
                    "published policy cannot be had now", version=published.version, reason=str(error)
                )
                pending.append(published)
                await asyncio.sleep(_RETRY_S)


def _parse(value: bytes) -> PolicyPublished | None:
    try:
        return PolicyPublished.FromString(value)
    except DecodeError:
        telemetry.log.error("an event of the policies topic is no PolicyPublished")
        return None
