"""The reward worker: trajectories in, scored trajectories out, a group at a time.

    TrajectoryCompleted ──▶ recorded with its group ──▶ the group is whole ──▶ all scored together ──▶ all published
                                    └─▶ else done: the member waits in Redis

The first record of a member holds and scores follow from the records alone, so every copy is equal byte by byte, and a
reader takes the first of each id. A crash between any two lines here only makes the event come again: the one that made
its group whole then publishes the whole group again.
"""

from __future__ import annotations

import asyncio
from datetime import UTC

from agentiad.v1 import events_pb2
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents
from services.reward import groups
from services.reward.records import Member, Records

GROUP = "reward"
SOURCE = "/agentiad/reward"
COMPLETED_TYPE = topics.TOPICS[topics.TRAJECTORIES].message.DESCRIPTOR.full_name
SCORED_TYPE = topics.TOPICS[topics.SCORED_TRAJECTORIES].message.DESCRIPTOR.full_name


async def run(bus: Bus, records: Records, *, max_in_flight: int, stop: asyncio.Event) -> None:
    """Scores trajectories, `max_in_flight` events at once, until `stop` is set."""

    async def handle(event: Event) -> None:
        attributes = cloudevents.parse(event.headers, COMPLETED_TYPE)
        completed = groups.parse_completed(event.value)
        with telemetry.bind(event_id=completed.event_id, episode_id=completed.trajectory.episode_id):
            groups.check_terms(completed, await records.agree(completed.group_id, groups.terms(completed)))
            member = Member(event.value, attributes.traceparent)
            members = await records.add(completed.group_id, completed.member, completed.group_size, member)
            if members:
                # In a thread: a large group takes a while, and health checks want an answer meanwhile.
                scored = await asyncio.to_thread(groups.score_group, [member.value for member in members])
                await _publish(bus, scored, [member.traceparent for member in members])
                telemetry.log.info("scored", group_id=completed.group_id, members=len(members), attempt=event.attempt)

    await bus.consume([topics.TRAJECTORIES], GROUP, handle, max_in_flight=max_in_flight, stop=stop)


async def _publish(bus: Bus, scored: list[events_pb2.TrajectoryScored], traceparents: list[str]) -> None:
    publishes = [_publish_one(bus, each, trace) for each, trace in zip(scored, traceparents, strict=True)]
    outcomes = await asyncio.gather(*publishes, return_exceptions=True)
    # Not before all have ended: none may go on when its event is given up.
    for outcome in outcomes:
        if outcome is not None:
            raise outcome


async def _publish_one(bus: Bus, scored: events_pb2.TrajectoryScored, traceparent: str) -> None:
    ended_at = scored.completed.trajectory.ended_at.ToDatetime(tzinfo=UTC)
    headers = cloudevents.headers(scored.event_id, SCORED_TYPE, SOURCE, ended_at, traceparent)
    value = scored.SerializeToString(deterministic=True)
    await bus.publish(topics.SCORED_TRAJECTORIES, scored.completed.group_id, value, headers)
