"""The trainer's end of the bus: asks for groups of rollouts, gathers them scored, and never asks for too many.

In flight are `max_staleness` + 1 batches at the most, the one in training included: what is asked for is then trained
at most `max_staleness` steps after the version that was newest. Where versions take longer to be served than a batch
to be played, some groups come too old all the same, and are dropped.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from agentiad.v1.events_pb2 import RolloutRequested, TrajectoryScored
from agentiad.v1.trajectory_pb2 import Limits, Sampling
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents
from services.chassis.errors import Transient
from services.trainer.groups import Group, Groups, right
from services.trainer.prompts import Curriculum, Prompt
from services.trainer.settings import RlSettings

SOURCE = "/agentiad/trainer"
REQUEST_TYPE = topics.TOPICS[topics.ROLLOUT_REQUESTS].message.DESCRIPTOR.full_name
# Between looks at deadlines while nothing arrives.
_LOOK_S = 1.0


class Rollouts:
    """`run` names the groups of this run, which shares the topics with others."""

    def __init__(self, settings: RlSettings, run: str, bus: Bus, prompts: Sequence[Prompt]) -> None:
        self._settings, self._run, self._bus, self._prompts = settings, run, bus, prompts
        self.groups = Groups(
            max_staleness=settings.max_staleness,
            deadline_s=settings.group_deadline_s,
            scale=settings.scale,
            tail=settings.tail,
        )
        self._curriculum = Curriculum(len(prompts), settings.seed, settings.hard_share)
        self._number = 0  # of the next group
        self._offsets: dict[int, int] = {}
        self._in_training = 0
        self._seen: list[TrajectoryScored] = []
        self._arrived = asyncio.Event()
        self._paused = False

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[None]:
        """Members are gathered while the block runs. What goes wrong with it ends `take`."""
        self._reader = asyncio.create_task(self._read())
        try:
            yield
        finally:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def take(self) -> list[Group]:
        """A batch of whole groups, none too stale. Raises Transient: none came within twice a group's deadline."""
        self._in_training = 0
        started = time.monotonic()
        while True:
            self.groups.expire(time.monotonic())
            await self._fill()
            batch = self.groups.take(self._settings.groups)
            if batch is not None:
                self._in_training = len(batch)
                return batch
            if self._reader.done():
                self._reader.result()
            if time.monotonic() - started > 2 * self._settings.group_deadline_s:
                raise Transient(self._complaint(time.monotonic() - started))
            self._arrived.clear()
            try:
                async with asyncio.timeout(_LOOK_S):
                    await self._arrived.wait()
            except TimeoutError:
                pass  # a deadline may have passed

    def pause(self) -> None:
        """Asks for nothing new until `go_on`."""
        self._paused = True

    def go_on(self) -> None:
        self._paused = False
        self._arrived.set()

    def seen(self) -> list[TrajectoryScored]:
        """The members of all groups that were completed since the last call, those with nothing to teach included."""
        seen, self._seen = self._seen, []
        return seen

    def state(self) -> dict[str, Any]:
        return {
            "number": self._number,
            "offsets": dict(self._offsets),
            "groups": self.groups.state(),
            "curriculum": self._curriculum.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self._number, self._offsets = state["number"], dict(state["offsets"])
        self.groups.restore(state["groups"], time.monotonic())
        self._curriculum.restore(state["curriculum"])

    async def ask_again(self) -> None:
        """Requests what a checkpoint was waiting for once more: who has answered already answers the same."""
        await asyncio.gather(*(self._request(group_id, prompt) for group_id, prompt in self.groups.asked()))

    async def _read(self) -> None:
        # From the beginning where no offset is known: an answer may have come before the first checkpoint.
        events = self._bus.read(
            topics.SCORED_TRAJECTORIES, from_beginning=True, stop=asyncio.Event(), offsets=self._offsets
        )
        async with aclosing(events):
            async for event in events:
                scored = parse_scored(event, self._run)
                self._offsets[event.partition] = event.offset + 1
                if scored is None:
                    continue
                self.groups.add(scored)
                for prompt, members in self.groups.outcomes():
                    self._curriculum.learnt(prompt, [right(member) for member in members])
                    self._seen += members
                self._arrived.set()
                await self._fill()  # a group that was dropped is replaced at once

    async def _fill(self) -> None:
        if self._paused:
            return
        capacity = (self._settings.max_staleness + 1) * self._settings.groups - self._in_training
        asked = []
        for _ in range(self.groups.room(capacity)):
            prompt = self._curriculum.next(self._number)
            group_id = f"{self._run}/{self._number:06d}-{prompt}"
            self._number += 1
            self.groups.request(group_id, prompt, time.monotonic())
            asked.append(self._request(group_id, prompt))
        await asyncio.gather(*asked)

    async def _request(self, group_id: str, prompt: int) -> None:
        """One event a member."""
        settings, asked = self._settings, self._prompts[prompt]
        number = int(group_id.rpartition("/")[2].partition("-")[0])
        seeds = np.random.default_rng([settings.seed, number, 3]).integers(2**63, size=settings.group_size)
        now = datetime.now(UTC)
        events = [
            RolloutRequested(
                event_id=f"{group_id}/{member}",
                group_id=group_id,
                member=member,
                group_size=settings.group_size,
                task=asked.task,
                ground_truth=asked.truth,
                sampling=Sampling(temperature=settings.temperature, seed=int(seed)),
                limits=Limits(
                    max_turns=settings.max_turns,
                    max_tool_calls=settings.max_tool_calls,
                    max_new_tokens=settings.max_new_tokens,
                ),
                probe_verdicts=settings.probe_verdicts,
                reward_preset=settings.reward,
            )
            for member, seed in enumerate(seeds)
        ]
        await asyncio.gather(
            *(
                self._bus.publish(
                    topics.ROLLOUT_REQUESTS,
                    event.event_id,
                    event.SerializeToString(),
                    cloudevents.headers(event.event_id, REQUEST_TYPE, SOURCE, now),
                )
                for event in events
            )
        )

    def _complaint(self, seconds: float) -> str:
        groups = self.groups
        return (
            f"no batch of {self._settings.groups} groups within {seconds:.0f} s ({groups.waiting} are asked for, "
            f"{groups.ready} are ready, dropped so far: {dict(groups.dropped)}): do agents (WORK=rollout), the reward "
            f"service and a policy that follows {topics.candidate_of(self._settings.policy)} run on this bus?"
        )


async def past_groups(bus: Bus, run: str, settings: RlSettings) -> list[Group]:
    """The whole groups of an earlier run that its topic still holds, those of equal rewards left out, in the order in
    which they were asked for: the same for the same topic, whatever its partitions' order.
    """
    asked: dict[str, dict[int, TrajectoryScored]] = {}
    stop, caught_up = asyncio.Event(), asyncio.Event()
    # Ends by itself when all that lay there is read.
    waiting = asyncio.create_task(caught_up.wait())
    waiting.add_done_callback(lambda _: stop.set())
    try:
        async for event in bus.read(topics.SCORED_TRAJECTORIES, from_beginning=True, stop=stop, caught_up=caught_up):
            scored = parse_scored(event, run)
            if scored is not None:
                asked.setdefault(scored.completed.group_id, {})[scored.completed.member] = scored
    finally:
        waiting.cancel()
    groups = Groups(max_staleness=0, deadline_s=0.0, scale=settings.scale, tail=settings.tail)
    for group_id in sorted(asked):
        groups.request(group_id, int(group_id.rpartition("-")[2]), 0.0)
        for scored in asked[group_id].values():
            groups.add(scored)
    return groups.whole()


def parse_scored(event: Event, run: str) -> TrajectoryScored | None:
    """The run's own member; None for another run's, and for what is no TrajectoryScored."""
    if not event.key.startswith(f"{run}/"):
        return None
    try:
        return TrajectoryScored.FromString(event.value)
    except DecodeError:
        telemetry.log.error("no TrajectoryScored", partition=event.partition, offset=event.offset)
        return None
