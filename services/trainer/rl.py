"""RL: rollouts over the bus → better versions of a policy, published as they are made. Run again after a kill.

    take a batch ─▶ encode ─▶ Learner.step ─▶ version folder ─▶ checkpoint ─▶ publish ─▶ (agents roll out by it)

Invariant: a version is in the checkpoint before it is published, so that a resumed run knows every version whose
rollouts may still come; its name holds the digest of its weights, so that no name ever stands for two policies.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc
import torch
from rich.console import Console
from transformers.utils import logging

from agentiad.v1.events_pb2 import TrajectoryScored
from agentiad.v1.policy_pb2 import DescribePolicyRequest, PolicyCard
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from services.chassis import rpc, topics
from services.chassis.bus import Bus, make_bus
from services.chassis.errors import BadInput, Transient
from services.chassis.images import make_image_store
from services.trainer import curves, measure, parallel, prompts, publishing
from services.trainer.encoding import RolloutEncoder
from services.trainer.groups import Group
from services.trainer.journal import METRICS, Journal, summary
from services.trainer.learner import make_learner
from services.trainer.parallel import Team, World
from services.trainer.progress import progress_bar
from services.trainer.rollout_metrics import busy_s, rollout_metrics, tokens_of
from services.trainer.rollouts import Rollouts, past_groups
from services.trainer.settings import RlSettings, TrainerSettings
from services.trainer.sft import OccupiedError
from services.vlm.card import read_card, write_card
from services.vlm.checkpoint import sha256_of
from services.vlm.render import Renderer

VERSIONS = "versions"
SERVICES = "services"  # what services of this machine keep that run for this run alone
_LOOK_S = 0.5  # between looks at which version the policy serves


class Source(Protocol):
    """Where batches come from: live rollouts, or the past of a topic."""

    async def take(self) -> list[Group]:
        """The next batch; empty: there is none any more."""
        ...

    def seen(self) -> Sequence[TrajectoryScored]: ...

    async def published(self, version: str, folder: Path) -> None:
        """A version was made and is in the checkpoint."""
        ...

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


async def train(settings: RlSettings, services: TrainerSettings, console: Console, replay: str = "") -> Path:
    """Trains `settings.steps` steps and returns the folder of the last version. `replay`: the id of an earlier run,
    whose rollouts are read from the topic instead of asking for new ones.

    Under torchrun every rank calls it; ranks other than 0 only compute, and return the folder of all versions.
    Raises OccupiedError; BadInput: there is no such earlier run; Transient: the services do not answer within their
    deadlines; ValueError: the settings do not fit so many ranks; LeaderError, on ranks other than 0: rank 0 has failed.
    """
    logging.disable_progress_bar()  # it would draw over our own
    torch.set_num_threads(settings.threads or torch.get_num_threads())
    with parallel.joined(_patience_s(settings)) as world:
        if world.rank > 0:
            console.quiet = True
            parallel.follow(make_learner(settings, Renderer.from_checkpoint(settings.base), world), world)
            return settings.out / VERSIONS
        newest = await _lead(settings, services, console, replay, world)
    curves.draw(settings.out / METRICS, settings.out / "curves.png")
    if settings.data == prompts.PROCEDURAL and settings.measured:
        report = settings.out / "report.json"
        await asyncio.to_thread(
            measure.report, settings.base, newest, settings.reward, settings.measured, report, console
        )
    return newest


async def _lead(settings: RlSettings, services: TrainerSettings, console: Console, replay: str, world: World) -> Path:
    run = Run(settings, services, world, replay)
    bus = make_bus(services)
    try:
        await bus.ensure_topics(topics.TOPICS)
        source = _replayed(run, bus, replay) if replay else _live(run, bus, console)
        async with source as batches:
            return await _loop(run, batches, console)
    finally:
        await bus.close()


def _patience_s(settings: RlSettings) -> float:
    """More than rank 0 can spend between two calls of its learner: its deadlines, and an hour for prompts and files."""
    return 2 * settings.group_deadline_s + 2 * settings.version_deadline_s + 3600


class Run:
    """All that a run is on this machine: its folder, its id, its learner and its checkpoint."""

    def __init__(self, settings: RlSettings, services: TrainerSettings, world: World, replay: str) -> None:
        self.settings, self.services = settings, services
        self.work = settings.out / "work"
        self.run_id = _occupy(settings, self.work, replay)
        self.renderer = Renderer.from_checkpoint(settings.base)
        learner = make_learner(settings, self.renderer, world)
        self.learner = learner if world.size == 1 else Team(learner, world)
        self.encoder = RolloutEncoder(self.renderer, make_image_store(services), settings.weights)
        self.step = 0
        self.version = ""
        self.trained: list[list[str]] = []  # group ids of each step

    def resume(self, source: Source) -> bool:
        """Puts the last checkpoint in place, if there is one."""
        path = self.work / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.step, self.version, self.trained = state["step"], state["version"], state["trained"]
        self.learner.restore(state["learner"])
        source.restore(state["source"])
        torch.set_rng_state(state["random"])
        return True

    def save(self, source_state: dict[str, Any]) -> None:
        """Everything that a resumed run needs; whole or not at all."""
        state = {
            "step": self.step,
            "version": self.version,
            "trained": self.trained,
            "learner": self.learner.state(),
            "source": source_state,
            "random": torch.get_rng_state(),
        }
        partial = self.work / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / "state.pt")

    def make_version(self) -> Path:
        """The weights as they are now, as a checkpoint folder named after step and digest."""
        base = read_card(self.settings.base)
        partial = self.settings.out / VERSIONS / f".{uuid.uuid4().hex}"
        self.learner.save(self.settings.base, partial)
        self.version = f"{base.base_model}-rl-{self.step:05d}-{sha256_of(partial)[:8]}"
        card = PolicyCard()
        card.CopyFrom(base)
        card.version = self.version
        card.quality.clear()
        card.training_data.append(f"RL on {self.settings.data}, reward {self.settings.reward}, {self.step} steps")
        write_card(partial, card)
        if self.folder.exists():
            shutil.rmtree(partial)
        else:
            partial.rename(self.folder)
        return self.folder

    @property
    def folder(self) -> Path:
        """Of the current version."""
        return self.settings.out / VERSIONS / self.version


async def _loop(run: Run, source: Source, console: Console) -> Path:
    settings, began = run.settings, time.time()
    journal = Journal(settings.out, settings.steps, run.step + 1)
    with progress_bar(console) as progress:
        bar = progress.add_task("steps", total=settings.steps, completed=run.step)
        while run.step < settings.steps:
            waiting = time.monotonic()
            groups = await source.take()
            if not groups:
                break
            idle_s = time.monotonic() - waiting
            learnt = await asyncio.to_thread(_learn, run, groups)
            run.step += 1
            run.trained.append([group.group_id for group in groups])
            seen = source.seen()
            now = time.time()
            metrics = {
                **learnt,
                **rollout_metrics(seen or [member for group in groups for member in group.members]),
                **_pace(seen, began, now, idle_s),
                **_standing(source, groups),
            }
            began = now
            journal.record(run.step, metrics)
            journal.keep(run.step, [member for group in groups for member in group.members])
            # After its line: a step that is in the checkpoint is never told again.
            await _publish(run, source)
            progress.update(bar, completed=run.step, description=f"steps  {summary(metrics)}")
    if run.step < settings.steps:  # a replay that had no more
        await _publish(run, source, last=True)
    journal.close()
    return run.folder


def _learn(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    return run.learner.step(run.encoder.encode(groups), run.step / run.settings.steps)


async def _publish(run: Run, source: Source, last: bool = False) -> None:
    """A version, if it is time for one or the `last` one, into the checkpoint and then to whoever follows."""
    due = last or run.step == run.settings.steps or run.step % run.settings.publish_every == 0
    if due:
        await asyncio.to_thread(run.make_version)
        if isinstance(source, _Live):
            source.rollouts.groups.versions.append(run.version)
    if due or run.step % run.settings.checkpoint_every == 0:
        await asyncio.to_thread(run.save, source.state())
    if due:
        publishing.prune(run.settings.out / VERSIONS, run.settings.keep_versions)
        await source.published(run.version, run.folder)


def _pace(seen: Sequence[TrajectoryScored], began: float, now: float, idle_s: float) -> dict[str, float]:
    seconds = max(now - began, 1e-3)
    return {
        "speed/step_s": seconds,
        "speed/trajectories_per_s": len(seen) / seconds,
        "speed/tokens_per_s": tokens_of(seen) / seconds,
        "idle/trainer": min(1.0, idle_s / seconds),
        "idle/policy": 1 - min(1.0, busy_s(seen, began, now) / seconds),
    }


def _standing(source: Source, groups: Sequence[Group]) -> dict[str, float]:
    if not isinstance(source, _Live):
        return {}
    state = source.rollouts.groups
    ages = [state.staleness(group) for group in groups]
    return {
        "staleness/mean": sum(ages) / len(ages),
        "staleness/worst": max(ages),
        **{f"groups/dropped_{name}": float(state.dropped[name]) for name in ("stale", "equal", "late")},
        "groups/waiting": float(state.waiting),
    }


class _Live:
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
async def _live(run: Run, bus: Bus, console: Console) -> AsyncIterator[Source]:
    settings, services = run.settings, run.services
    async with rpc.channel(services.policy_address) as policy, rpc.channel(services.retrieval_address) as retrieval:
        console.print(f"run {run.run_id}: preparing {settings.prompts} prompts")
        store = make_image_store(services)
        asked = await prompts.prepare(
            settings.data, settings.prompts, settings.seed, store, RetrievalServiceStub(retrieval)
        )
        source = _Live(run, bus, Rollouts(settings, run.run_id, bus, asked), PolicyServiceStub(policy))
        if run.resume(source):
            console.print(f"resumed at step {run.step}")
        else:
            await asyncio.to_thread(run.make_version)
            source.rollouts.groups.versions.append(run.version)
            await asyncio.to_thread(run.save, source.state())
        await source.publish(run.version, run.folder)
        await source.served(run.version)
        await source.rollouts.ask_again()
        async with source.running():
            yield source


class _Replay:
    """The batches of an earlier run, again."""

    def __init__(self, settings: RlSettings, groups: Sequence[Group]) -> None:
        self._size, self._groups, self._taken = settings.groups, groups, 0

    async def take(self) -> list[Group]:
        batch = list(self._groups[self._taken : self._taken + self._size])
        self._taken += len(batch)
        return batch if len(batch) == self._size else []

    def seen(self) -> Sequence[TrajectoryScored]:
        return []

    async def published(self, version: str, folder: Path) -> None:
        """Nobody rolls out by it."""

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def restore(self, state: dict[str, Any]) -> None:
        self._taken = state["taken"]


@asynccontextmanager
async def _replayed(run: Run, bus: Bus, past: str) -> AsyncIterator[Source]:
    groups = await past_groups(bus, past, run.settings)
    if len(groups) < run.settings.groups:
        raise BadInput(
            f"of run {past!r} the topic {topics.SCORED_TRAJECTORIES} holds {len(groups)} whole groups whose rewards "
            f"differ, and a step takes {run.settings.groups}"
        )
    source = _Replay(run.settings, groups)
    if not run.resume(source):
        await asyncio.to_thread(run.make_version)
    yield source


def _occupy(settings: RlSettings, work: Path, replay: str) -> str:
    """Takes the folder for this run, or finds that this run has it already; the run's id."""
    said = f"{settings.identity()}\nreplay: {replay}\n"
    others = {path.name for path in settings.out.iterdir()} - {SERVICES} if settings.out.exists() else set()
    if others and not work.exists():
        raise OccupiedError(f"{settings.out} holds something else already: choose another folder")
    work.mkdir(parents=True, exist_ok=True)
    (settings.out / VERSIONS).mkdir(exist_ok=True)
    for torn in (settings.out / VERSIONS).glob(".*"):  # left by a kill
        shutil.rmtree(torn)
    identity, name = work / "settings", work / "run"
    if identity.exists() and identity.read_text() != said:
        raise OccupiedError(f"{settings.out} holds a run with other settings ({identity}): choose another folder")
    identity.write_text(said)
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    return name.read_text()
