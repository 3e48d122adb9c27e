"""The rollout worker: rollout requests in, trajectories out. The inspection worker's loop with sampling and probes.

As for inspections: one result an event, recorded before it is published; a crash only makes the request come again, and
its episode goes on from the recorded steps.
"""

from __future__ import annotations

import asyncio
import math
from datetime import UTC

from google.protobuf.message import DecodeError

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent.records import Records
from services.agent.runner import OnTurn, Runner
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents
from services.chassis.errors import BadInput

GROUP = "rollout"
SOURCE = "/agentiad/agent"
REQUEST_TYPE = topics.TOPICS[topics.ROLLOUT_REQUESTS].message.DESCRIPTOR.full_name
TRAJECTORY_TYPE = topics.TOPICS[topics.TRAJECTORIES].message.DESCRIPTOR.full_name
# Bounds of what a request may ask for: beyond them it is a mistake.
_MAX_GROUP, _MAX_TURNS, _MAX_NEW_TOKENS = 1024, 64, 65_536


async def run(
    bus: Bus,
    runner: Runner,
    records: Records[events_pb2.TrajectoryCompleted],
    *,
    max_in_flight: int,
    stop: asyncio.Event,
) -> None:
    """Plays rollouts, `max_in_flight` episodes at once, until `stop` is set."""

    async def handle(event: Event) -> None:
        attributes = cloudevents.parse(event.headers, REQUEST_TYPE)
        request = parse_request(event.value)
        with telemetry.bind(event_id=request.event_id, episode_id=request.event_id):
            completed = await roll_out_once(runner, records, request)
            headers = cloudevents.headers(
                completed.event_id,
                TRAJECTORY_TYPE,
                SOURCE,
                completed.trajectory.ended_at.ToDatetime(tzinfo=UTC),
                attributes.traceparent,
            )
            await bus.publish(topics.TRAJECTORIES, completed.group_id, completed.SerializeToString(), headers)

    await bus.consume([topics.ROLLOUT_REQUESTS], GROUP, handle, max_in_flight=max_in_flight, stop=stop)


async def roll_out_once(
    runner: Runner, records: Records[events_pb2.TrajectoryCompleted], request: events_pb2.RolloutRequested
) -> events_pb2.TrajectoryCompleted:
    """The request's one trajectory: the recorded one, or that of an episode which goes on from its recorded steps."""

    async def play(trajectory: pb.Trajectory | None, save: OnTurn) -> events_pb2.TrajectoryCompleted:
        if trajectory is None:
            trajectory = await runner.begin(request.event_id, request.task, request.limits, request.sampling)
        await runner.run(trajectory, save, probe=request.probe_verdicts)
        return complete(request, trajectory)

    return await records.once(request.event_id, play)


def complete(request: events_pb2.RolloutRequested, trajectory: pb.Trajectory) -> events_pb2.TrajectoryCompleted:
    """What the reward is told."""
    return events_pb2.TrajectoryCompleted(
        event_id=request.event_id,
        group_id=request.group_id,
        member=request.member,
        group_size=request.group_size,
        ground_truth=request.ground_truth,
        trajectory=trajectory,
        reward_preset=request.reward_preset,
    )


def parse_request(value: bytes) -> events_pb2.RolloutRequested:
    """The event that a trainer published. Raises BadInput with everything that is wrong with it."""
    try:
        request = events_pb2.RolloutRequested.FromString(value)
    except DecodeError:
        raise BadInput("the body is not an agentiad.v1.RolloutRequested") from None
    wrong = [
        f"{name} must be 1 to 200 printable characters"
        for name, text in (("event_id", request.event_id), ("group_id", request.group_id))
        if not (0 < len(text) <= 200 and text.isprintable())
    ]
    if not 1 <= request.group_size <= _MAX_GROUP:
        wrong.append(f"group_size must lie between 1 and {_MAX_GROUP}")
    elif request.member >= request.group_size:
        wrong.append("member must be below group_size")
    if request.task.image.WhichOneof("source") != "reference":
        wrong.append("task.image must be a reference: images do not ride in events")
    if not request.task.category:
        wrong.append("task.category is empty")
    if request.limits.max_turns > _MAX_TURNS:
        wrong.append(f"limits.max_turns must be {_MAX_TURNS} at most")
    if not 1 <= request.limits.max_new_tokens <= _MAX_NEW_TOKENS:
        wrong.append(f"limits.max_new_tokens must lie between 1 and {_MAX_NEW_TOKENS}")
    if not (math.isfinite(request.sampling.temperature) and request.sampling.temperature >= 0):
        wrong.append("sampling.temperature must be a number from 0")
    if wrong:
        raise BadInput("; ".join(wrong))
    return request
