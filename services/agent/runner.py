"""Runs an episode: does what the state machine asks for, by the stubs of policy, zoom and retrieval."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

import grpc

from agentiad.v1 import policy_pb2, retrieval_pb2, zoom_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import episode
from services.chassis.errors import NotFound
from services.chassis.rpc import from_rpc_error

if TYPE_CHECKING:
    # These exist for the type checker only.
    from agentiad.v1.policy_pb2_grpc import PolicyServiceAsyncStub
    from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceAsyncStub
    from agentiad.v1.zoom_pb2_grpc import ZoomServiceAsyncStub

RequestT = TypeVar("RequestT")
ResponseT = TypeVar("ResponseT")
OnTurn = Callable[[pb.Trajectory], Awaitable[None]]


@dataclass(frozen=True)
class Runner:
    """Errors of the services come out as the chassis' errors: BadInput (an unusable image), Transient, Exhausted."""

    policy: PolicyServiceAsyncStub
    zoom: ZoomServiceAsyncStub
    retrieval: RetrievalServiceAsyncStub

    async def begin(self, episode_id: str, task: pb.Task, limits: pb.Limits, sampling: pb.Sampling) -> pb.Trajectory:
        """A fresh trajectory for the policy version that is current now."""
        card = (await _call(self.policy.DescribePolicy, policy_pb2.DescribePolicyRequest())).card
        trajectory = episode.begin(episode_id, task, limits, sampling, card)
        trajectory.started_at.FromDatetime(datetime.now(UTC))
        return trajectory

    async def run(self, trajectory: pb.Trajectory, on_turn: OnTurn, *, probe: bool = False) -> None:
        """Goes on from where the trajectory stands until it is finished; `on_turn` is awaited after each step.

        `probe`: before each tool call the policy is also asked for the verdict that it would give without it.
        When the version that began the episode is gone, the episode starts anew on the current one: its token ids mean
        nothing to another policy.
        """
        while not isinstance(step := episode.next_step(trajectory), episode.Finished):
            try:
                await self._advance(trajectory, step, probe)
            except NotFound:
                if await self._restarted(trajectory):
                    continue
                # Its version may have been loaded a moment ago; else an image is gone, and this says so.
                await self._advance(trajectory, step, probe)
            if trajectory.stop_reason:
                trajectory.ended_at.FromDatetime(datetime.now(UTC))
            await on_turn(trajectory)

    async def _advance(self, trajectory: pb.Trajectory, step: episode.Step, probe: bool) -> None:
        started = time.monotonic()
        if isinstance(step, episode.GenerateStep):
            generation = await self._generate(step)
            episode.add_generation(trajectory, generation, _since(started))
            return
        assert not isinstance(step, episode.Finished)
        probing = asyncio.ensure_future(self._generate(episode.forced_step(trajectory))) if probe else None
        try:
            observation = await self._use_tool(trajectory, step)
            latency = _since(started)
            if probing is not None:
                episode.add_probe(trajectory, await probing)
        finally:
            if probing is not None:
                probing.cancel()
                await asyncio.wait([probing])
        episode.add_observation(trajectory, observation, latency)

    async def _use_tool(self, trajectory: pb.Trajectory, step: episode.CropStep | episode.QueryStep) -> pb.Observation:
        return await (
            self._crop(trajectory, step) if isinstance(step, episode.CropStep) else self._query(trajectory, step)
        )

    async def _restarted(self, trajectory: pb.Trajectory) -> bool:
        """Starts the episode anew if the version that began it is no longer the current one."""
        fresh = await self.begin(trajectory.episode_id, trajectory.task, trajectory.limits, trajectory.sampling)
        if fresh.policy_version == trajectory.policy_version:
            return False
        trajectory.CopyFrom(fresh)
        return True

    async def _generate(self, step: episode.GenerateStep) -> pb.Generation:
        request = policy_pb2.GenerateRequest(
            messages=step.messages, sampling=step.sampling, policy_version=step.policy_version
        )
        return (await _call(self.policy.Generate, request)).generation

    async def _crop(self, trajectory: pb.Trajectory, step: episode.CropStep) -> pb.Observation:
        if step.exemplar is not None:
            return await self._compare(trajectory, step.exemplar, step.box)
        response = await _call(self.zoom.Crop, zoom_pb2.CropRequest(image=trajectory.task.image, box=step.box))
        if response.HasField("tool_error"):
            return pb.Observation(tool_error=response.tool_error)
        return pb.Observation(image=response.crop.image, region=response.crop.region)

    async def _query(self, trajectory: pb.Trajectory, step: episode.QueryStep) -> pb.Observation:
        request = retrieval_pb2.QueryExemplarsRequest(
            image=trajectory.task.image, category=trajectory.task.category, limit=1
        )
        found = await _call(self.retrieval.QueryExemplars, request)
        if not found.exemplars:
            return pb.Observation(tool_error=f"There is no normal image of {trajectory.task.category}.")
        return await self._compare(trajectory, found.exemplars[0].image, step.box)

    async def _compare(
        self, trajectory: pb.Trajectory, exemplar: pb.ImageReference, box: pb.Box | None
    ) -> pb.Observation:
        request = zoom_pb2.CompareRequest(
            part=trajectory.task.image,
            exemplar=pb.Image(reference=exemplar),
            box=box,
            view=trajectory.comparison_view,
        )
        response = await _call(self.zoom.Compare, request)
        if response.HasField("tool_error"):
            return pb.Observation(tool_error=response.tool_error)
        return pb.Observation(
            image=response.comparison.image,
            region=response.comparison.region,
            exemplar=exemplar,
            registration_confidence=response.registration_confidence,
            registered=response.registered,
        )


async def _call(method: grpc.aio.UnaryUnaryMultiCallable[RequestT, ResponseT], request: RequestT) -> ResponseT:
    try:
        return await method(request)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


def _since(started: float) -> timedelta:
    return timedelta(seconds=time.monotonic() - started)
