"""RL: rollouts over the bus → better versions of a policy, published as they are made. Run again after a kill.

    take a batch ─▶ encode ─▶ Learner.step ─▶ version folder ─▶ checkpoint ─▶ publish ─▶ (agents roll out by it)

Invariant: a version is in the checkpoint before it is published, so that a resumed run knows every version whose
rollouts may still come; its name holds the digest of its weights, so that no name ever stands for two policies.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from agentiad.v1.events_pb2 import TrajectoryScored
from services.chassis import topics
from services.chassis.bus import make_bus
from services.data.source import PROCEDURAL
from services.trainer import curves, measure, parallel, publishing
from services.trainer.groups import Group
from services.trainer.journal import METRICS, Journal, summary
from services.trainer.learner import make_learner
from services.trainer.parallel import World
from services.trainer.progress import progress_bar
from services.trainer.rollout_metrics import busy_s, rollout_metrics, tokens_of
from services.trainer.run import VERSIONS, Run
from services.trainer.settings import RlSettings, TrainerSettings
from services.trainer.sources import Source, live, replayed
from services.vlm.render import Renderer


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
    if settings.data == PROCEDURAL and settings.measured:
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
        source = replayed(run, bus, replay) if replay else live(run, bus, console)
        async with source as batches:
            return await _loop(run, batches, console)
    finally:
        await bus.close()


def _patience_s(settings: RlSettings) -> float:
    """More than rank 0 can spend between two calls of its learner: its deadlines, and an hour for prompts and files."""
    return 2 * settings.group_deadline_s + 2 * settings.version_deadline_s + 3600


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
                **source.standing(groups),
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
        source.made(run.version)
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
