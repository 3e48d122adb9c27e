"""Where an RL run's batches come from: rollouts that agents play now, or those of an earlier run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
from rich.console import Console

from agentiad.v1.events_pb2 import TrajectoryScored
from agentiad.v1.policy_pb2 import DescribePolicyRequest
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from services.chassis import rpc, topics
from services.chassis.bus import Bus
from services.chassis.errors import BadInput, Transient
from services.chassis.images import make_image_store
from services.trainer import prompts, publishing
from services.trainer.groups import Group
from services.trainer.rollouts import Rollouts, past_groups
from services.trainer.run import Run
from services.trainer.settings import RlSettings

_LOOK_S = 0.5  # between looks at which version the policy serves


class Source(Protocol):
    """Where batches come from: live rollouts, or the past of a topic."""

    async def take(self) -> list[Group]:
        """The next batch; empty: there is none any more."""
        ...

    def seen(self) -> Sequence[TrajectoryScored]:
        """What has come in since the last call."""
        ...

    def standing(self, groups: Sequence[Group]) -> dict[str, float]:
        """Metrics of a batch that was just learnt, and of what is under way."""
        ...

    def made(self, version: str) -> None:
        """A version was made; it will be published once it is in the checkpoint."""
        ...

    async def published(self, version: str, folder: Path) -> None:
        """Tells whoever follows that the version is there."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Live:
    """Rollouts by agents, and the versions that they follow."""

    def __init__(self, run: Run, bus: Bus, rollouts: Rollouts, policy: Any) -> None:
        self._run, self._bus, self.rollouts, self._policy = run, bus, rollouts, policy
        self._serving: asyncio.Task[None] | None = None  # of the newest version

    async def take(self) -> list[Group]:
        """Raises Transient: the newest version is not served, or no rollouts come, within their deadlines."""
        taking = asyncio.create_task(self.rollouts.take())
        try:
            if self._serving is not None:
                await asyncio.wait([taking, self._serving], return_when=asyncio.FIRST_COMPLETED)
                if self._serving.done():
                    self._serving.result()
            return await taking
        finally:
            taking.cancel()

    def seen(self) -> Sequence[TrajectoryScored]:
        return self.rollouts.seen()

    def standing(self, groups: Sequence[Group]) -> dict[str, float]:
        state = self.rollouts.groups
        ages = [state.staleness(group) for group in groups]
        return {
            "staleness/mean": sum(ages) / len(ages),
            "staleness/worst": max(ages),
            **{f"groups/dropped_{name}": float(state.dropped[name]) for name in ("stale", "equal", "late")},
            "groups/waiting": float(state.waiting),
        }

    def made(self, version: str) -> None:
        self.rollouts.groups.versions.append(version)

    async def published(self, version: str, folder: Path) -> None:
        """A synchronous run asks for nothing until the policy serves it: rollouts by the one before would be too old.
        Another one goes on, but for the deadline.
        """
        if self._run.settings.max_staleness == 0:
            self.rollouts.pause()
        await self.publish(version, folder)
        await self._stop_waiting()
        self._serving = asyncio.create_task(self._ask_by(version))

    async def _ask_by(self, version: str) -> None:
        await self.served(version)
        self.rollouts.go_on()

    async def _stop_waiting(self) -> None:
        if self._serving is not None:
            self._serving.cancel()
            await asyncio.gather(self._serving, return_exceptions=True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with self.rollouts.reading():
            try:
                yield
            finally:
                await self._stop_waiting()

    async def publish(self, version: str, folder: Path) -> None:
        name = topics.candidate_of(self._run.settings.policy)
        await publishing.publish(self._bus, name, folder, version, {})

    async def served(self, version: str) -> None:
        """Returns when the policy serves it. Raises Transient after the deadline."""
        deadline_s, found = self._run.settings.version_deadline_s, "no answer"
        try:
            async with asyncio.timeout(deadline_s):
                while True:
                    try:
                        found = (await self._policy.DescribePolicy(DescribePolicyRequest())).card.version
                    except grpc.aio.AioRpcError as error:
                        found = f"{error.code().name}: {error.details()}"
                    if found == version:
                        return
                    await asyncio.sleep(_LOOK_S)
        except TimeoutError:
            name = topics.candidate_of(self._run.settings.policy)
            raise Transient(
                f"the policy at {self._run.services.policy_address} does not serve version {version} within "
                f"{deadline_s:.0f} s, but {found}: does it follow POLICY_NAME={name}, and is {self._run.folder} under "
                "its CHECKPOINT_ROOTS?"
            ) from None

    def state(self) -> dict[str, Any]:
        return self.rollouts.state()

    def restore(self, state: dict[str, Any]) -> None:
        self.rollouts.restore(state)


@asynccontextmanager
async def live(run: Run, bus: Bus, console: Console) -> AsyncIterator[Source]:
    """For a fresh run its first version is the base itself. Raises Transient: the policy does not come to serve it."""
    settings, services = run.settings, run.services
    async with rpc.channel(services.policy_address) as policy, rpc.channel(services.retrieval_address) as retrieval:
        console.print(f"run {run.run_id}: preparing {settings.prompts} prompts")
        store = make_image_store(services)
        asked = await prompts.prepare(
            settings.data, settings.prompts, settings.seed, store, RetrievalServiceStub(retrieval)
        )
        source = Live(run, bus, Rollouts(settings, run.run_id, bus, asked), PolicyServiceStub(policy))
        state = run.resume()
        if state is not None:
            source.restore(state)
            console.print(f"resumed at step {run.step}")
        else:
            await asyncio.to_thread(run.make_version)
            source.made(run.version)
            await asyncio.to_thread(run.save, source.state())
        await source.publish(run.version, run.folder)
        await source.served(run.version)
        await source.rollouts.ask_again()
        async with source.running():
            yield source


class Replay:
    """The batches of an earlier run, again."""

    def __init__(self, settings: RlSettings, groups: Sequence[Group]) -> None:
        self._size, self._groups, self._taken = settings.groups, groups, 0

    async def take(self) -> list[Group]:
        batch = list(self._groups[self._taken : self._taken + self._size])
        self._taken += len(batch)
        return batch if len(batch) == self._size else []

    def seen(self) -> Sequence[TrajectoryScored]:
        return []

    def standing(self, groups: Sequence[Group]) -> dict[str, float]:
        return {}

    def made(self, version: str) -> None:
        """Nobody rolls out by it."""

    async def published(self, version: str, folder: Path) -> None:
        """Nobody rolls out by it."""

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]


@asynccontextmanager
async def replayed(run: Run, bus: Bus, past: str) -> AsyncIterator[Source]:
    """Raises BadInput: the topic holds no batch of such a run."""
    groups = await past_groups(bus, past, run.settings)
    if len(groups) < run.settings.groups:
        raise BadInput(
            f"of run {past!r} the topic {topics.SCORED_TRAJECTORIES} holds {len(groups)} whole groups whose rewards "
            f"differ, and a step takes {run.settings.groups}"
        )
    source = Replay(run.settings, groups)
    state = run.resume()
    if state is not None:
        source.restore(state)
    else:
        await asyncio.to_thread(run.make_version)
    yield source
