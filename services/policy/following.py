"""Taking over the versions that a trainer publishes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from google.protobuf.message import DecodeError

from agentiad.v1.events_pb2 import PolicyPublished
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis import telemetry
from services.chassis.bus import Bus
from services.chassis.errors import BadInput, Exhausted, Transient
from services.chassis.topics import POLICIES

# Between attempts to fetch a checkpoint from a store that cannot be reached.
_RETRY_S = 5.0
Load = Callable[[str, str, str], Awaitable[PolicyCard]]


async def follow(bus: Bus, policy: str, load: Load, stop: asyncio.Event, settled: asyncio.Event) -> None:
    """Until `stop` is set: loads (checkpoint URI, sha256, version) of the newest event of `policy`.

    Every replica reads the whole topic, so that one that starts later has the same version as the others. Older
    events are skipped, unless the newer ones cannot be loaded. `settled` is set once this is done for all that was
    published before. Whatever an event says, it does not end this: every restart would read it again.
    """
    pending: list[PolicyPublished] = []
    arrived, caught_up = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        loading = group.create_task(_load_pending(pending, arrived, caught_up, load, settled))
        async for event in bus.read(POLICIES, from_beginning=True, stop=stop, caught_up=caught_up):
            published = _parse(event.value)
            if published is not None and published.policy == policy:
                pending.append(published)
                arrived.set()
        loading.cancel()


async def _load_pending(
    pending: list[PolicyPublished], arrived: asyncio.Event, caught_up: asyncio.Event, load: Load, settled: asyncio.Event
) -> None:
    # The first event is the oldest: without this it would be loaded for nothing.
    await caught_up.wait()
    while True:
        while pending:
            await _load_newest(pending, load)
        settled.set()
        await arrived.wait()
        arrived.clear()


async def _load_newest(pending: list[PolicyPublished], load: Load) -> None:
    """Tries the last of `pending`. Takes out what is dealt with; what is appended meanwhile is newer, and stays."""
    count, published = len(pending), pending[-1]
    try:
        await load(published.checkpoint_uri, published.sha256, published.version)
        del pending[:count]
    except (Exhausted, Transient) as error:
        telemetry.log.warning("published policy cannot be had now", version=published.version, reason=str(error))
        await asyncio.sleep(_RETRY_S)
    except Exception as error:
        # Beside BadInput: a foreign checkpoint can fail in any of the libraries that read it.
        unexpected = not isinstance(error, BadInput)
        telemetry.log.error(
            "published policy is refused", version=published.version, reason=str(error), exc_info=unexpected
        )
        del pending[count - 1]


def _parse(value: bytes) -> PolicyPublished | None:
    try:
        return PolicyPublished.FromString(value)
    except DecodeError:
        telemetry.log.error("an event of the policies topic is no PolicyPublished")
        return None
