"""Rollouts for the tests of RL: scored members written down, requests for real parts, and who answers requests."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.events_pb2 import RolloutRequested, TrajectoryCompleted, TrajectoryScored
from agentiad.v1.retrieval_pb2 import AddExemplarsRequest
from agentiad.v1.reward_pb2 import Reward
from services.chassis import topics
from services.chassis.bus import Bus, cloudevents
from services.cli.stack import Stack
from services.data import procedural
from services.trainer.prompts import Prompt
from services.trainer.settings import RlSettings

PATIENCE_S = 60.0
Answer = Callable[[RolloutRequested], TrajectoryScored | None]


def make_settings(**changes: object) -> RlSettings:
    """Two groups of three a step, one batch ahead."""
    values = {
        "out": Path("out"),
        "base": Path("base"),
        "groups": 2,
        "group_size": 3,
        "max_staleness": 1,
        "divide_by_std": False,
    }
    return RlSettings.model_validate({**values, **changes})


def make_prompts(count: int = 5) -> list[Prompt]:
    """Every second part is anomalous."""
    return [
        Prompt(
            pb.Task(image=pb.Image(reference=pb.ImageReference(uri=f"file:///{number}.png")), category="bolt"),
            pb.GroundTruth(anomaly_present=number % 2 == 1),
        )
        for number in range(count)
    ]


def make_trajectory(
    versions: Sequence[str] = ("v0",),
    *,
    anomalous: bool = True,
    stop: pb.StopReason.ValueType = pb.STOP_REASON_ANSWERED,
) -> pb.Trajectory:
    """A finished episode with a turn of the policy for each version."""
    trajectory = pb.Trajectory(verdict=pb.Verdict(anomaly_present=anomalous), stop_reason=stop)
    trajectory.turns.add(message=pb.Message(role=pb.ROLE_USER))
    for version in versions:
        trajectory.turns.add(generation=pb.Generation(token_ids=[1, 2], policy_version=version))
    return trajectory


def make_scored(
    group_id: str,
    member: int,
    *,
    group_size: int = 3,
    total: float | None = None,
    trajectory: pb.Trajectory | None = None,
    truth: bool = True,
) -> TrajectoryScored:
    """A member; without a total the rewards of a group differ."""
    completed = TrajectoryCompleted(
        event_id=f"{group_id}/{member}",
        group_id=group_id,
        member=member,
        group_size=group_size,
        ground_truth=pb.GroundTruth(anomaly_present=truth),
        trajectory=make_trajectory() if trajectory is None else trajectory,
    )
    reward = Reward(total=float(member) if total is None else total)
    return TrajectoryScored(event_id=completed.event_id, completed=completed, reward=reward)


def answer(
    request: RolloutRequested, versions: Sequence[str] = ("v0",), total: float | None = None
) -> TrajectoryScored:
    """What an agent and the reward make of a request: the verdict of even members is right."""
    truth = request.ground_truth.anomaly_present
    trajectory = make_trajectory(versions, anomalous=truth == (request.member % 2 == 0))
    return make_scored(
        request.group_id,
        request.member,
        group_size=request.group_size,
        total=total,
        trajectory=trajectory,
        truth=truth,
    )


async def publish(bus: Bus, *members: TrajectoryScored) -> None:
    """As the reward service does, one after another."""
    for scored in members:
        headers = cloudevents.headers(scored.event_id, scored.DESCRIPTOR.full_name, "/test", datetime.now(UTC))
        key = scored.completed.group_id
        await bus.publish(topics.SCORED_TRAJECTORIES, key, scored.SerializeToString(), headers)


@asynccontextmanager
async def answering(bus: Bus, reply: Answer) -> AsyncIterator[list[RolloutRequested]]:
    """An agent and a reward in one, until the block ends; yields what they were asked. A reply of None: none comes."""
    asked: list[RolloutRequested] = []

    async def work() -> None:
        reading = bus.read(topics.ROLLOUT_REQUESTS, from_beginning=True, stop=asyncio.Event())
        async with aclosing(reading) as events:
            async for event in events:
                asked.append(RolloutRequested.FromString(event.value))
                scored = reply(asked[-1])
                if scored is not None:
                    await publish(bus, scored)

    task = asyncio.create_task(work())
    try:
        yield asked
    finally:
        task.cancel()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()


def make_truth(part: procedural.Part) -> pb.GroundTruth:
    truth = pb.GroundTruth(anomaly_present=bool(part.defects))
    for defect in part.defects:
        x_min, y_min, x_max, y_max = defect.box
        truth.defects.add(type=defect.type, box=pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))
    return truth


async def make_request(
    stack: Stack, part: procedural.Part, group_id: str, member: int = 0, **limits: int
) -> RolloutRequested:
    """To play `part`, whose picture and normal unit are put where the stack finds them."""
    normal = procedural.make_part(
        part.category, procedural.exemplar_seed(part.variant), part.variant, None, smudged=False
    )
    exemplar = stack.images.put(normal.image)
    await stack.retrieval.AddExemplars(AddExemplarsRequest(category=part.category, images=[exemplar]))
    return RolloutRequested(
        event_id=f"{group_id}/{member}",
        group_id=group_id,
        member=member,
        group_size=2,
        task=pb.Task(image=pb.Image(reference=stack.images.put(part.image)), category=part.category),
        ground_truth=make_truth(part),
        sampling=pb.Sampling(temperature=1, seed=1000 * member),
        limits=pb.Limits(**{"max_turns": 6, "max_tool_calls": 3, "max_new_tokens": 128, **limits}),
        probe_verdicts=True,
        reward_preset="gated",
    )
