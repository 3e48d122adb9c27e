"""Which published versions are loaded, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from agentiad.v1.events_pb2 import PolicyPublished
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.errors import BadInput, Exhausted, Transient
from services.chassis.topics import POLICIES, TOPICS
from services.policy import following
from services.policy.following import follow
from tests.policy.conversations import eventually


class Loader:
    """Takes note of what it is told to load. `errors`: what a version's attempts raise, one after the other."""

    def __init__(self, errors: Mapping[str, list[Exception]] | None = None) -> None:
        self.attempts: list[str] = []
        self._errors = errors or {}
        # Loading stands still while it is not set.
        self.gate = asyncio.Event()
        self.gate.set()

    async def __call__(self, checkpoint_uri: str, sha256: str, version: str) -> PolicyCard:
        self.attempts.append(version)
        await self.gate.wait()
        if self._errors.get(version):
            raise self._errors[version].pop(0)
        return PolicyCard(version=version)


@pytest_asyncio.fixture
async def bus(tmp_path: Path) -> AsyncIterator[SqliteBus]:
    made = SqliteBus(tmp_path / "bus.db")
    await made.ensure_topics(TOPICS)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "_RETRY_S", 0.05)


async def publish(bus: SqliteBus, *versions: str) -> None:
    for version in versions:
        event = PolicyPublished(policy="policy", version=version, checkpoint_uri=f"/models/{version}")
        await bus.publish(POLICIES, "policy", event.SerializeToString(), {})


@asynccontextmanager
async def followed(bus: SqliteBus, loader: Loader) -> AsyncIterator[asyncio.Event]:
    """Gives what is set once all that was published before is dealt with."""
    stop, settled = asyncio.Event(), asyncio.Event()
    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(follow(bus, "policy", loader, stop, settled))
        yield settled
        stop.set()


async def test_of_what_was_published_before_only_the_newest_is_loaded(bus: SqliteBus) -> None:
    await publish(bus, "one", "two", "three")
    loader = Loader()
    async with followed(bus, loader) as settled:
        await settled.wait()
        assert loader.attempts == ["three"]


async def test_where_nothing_was_published_there_is_nothing_to_wait_for(bus: SqliteBus) -> None:
    loader = Loader()
    async with followed(bus, loader) as settled:
        await settled.wait()
        assert loader.attempts == []


async def test_one_that_is_published_while_another_is_loaded_comes_next(bus: SqliteBus) -> None:
    loader = Loader()
    async with followed(bus, loader):
        loader.gate.clear()
        await publish(bus, "one")
        await eventually(lambda: loader.attempts == ["one"])
        await publish(bus, "two", "three")
        await arrival(bus)
        loader.gate.set()
        await eventually(lambda: loader.attempts == ["one", "three"])


@pytest.mark.parametrize("error", [Transient("no network"), Exhausted("no room")])
async def test_a_newer_one_goes_before_one_that_is_tried_again(bus: SqliteBus, error: Exception) -> None:
    loader = Loader({"one": [error], "two": [BadInput("torn")]})
    async with followed(bus, loader):
        loader.gate.clear()
        await publish(bus, "one")
        await eventually(lambda: loader.attempts == ["one"])
        await publish(bus, "two")
        await arrival(bus)
        loader.gate.set()
        await eventually(lambda: loader.attempts == ["one", "two", "one"])


async def test_it_is_settled_when_none_can_be_loaded(bus: SqliteBus) -> None:
    """Whatever goes wrong: every restart would read the same events."""
    await publish(bus, "one", "two", "three")
    loader = Loader({"one": [KeyError("in some library")], "two": [BadInput("torn")], "three": [OSError("denied")]})
    async with followed(bus, loader) as settled:
        await settled.wait()
        assert loader.attempts == ["three", "two", "one"]
        await publish(bus, "four")
        await eventually(lambda: loader.attempts[3:] == ["four"])


async def test_it_is_not_settled_while_the_newest_cannot_be_had(bus: SqliteBus) -> None:
    await publish(bus, "one", "two")
    loader = Loader({"two": [Transient("no network")] * 3})
    async with followed(bus, loader) as settled:
        await settled.wait()
        assert loader.attempts == ["two"] * 4


async def arrival(bus: SqliteBus) -> None:
    """What was published before has reached the follower: it takes events in their order, and says so of nonsense."""
    with capture_logs() as logs:
        await bus.publish(POLICIES, "policy", b"\xffnonsense", {})
        await eventually(lambda: any("no PolicyPublished" in line["event"] for line in logs))
