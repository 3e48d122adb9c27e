"""The inspection worker: image events in, inspections out, exactly one result an event.

At-least-once delivery, a result that is recorded before it is published, and the event's own id as the inspection's id
make copies equal: a reader who takes the first of each id sees each event's one verdict. A crash between any two lines
here only makes the event come again; its episode goes on from the recorded steps.
"""

from __future__ import annotations

import asyncio
from datetime import UTC

from agentiad.v1 import events_pb2
from services.agent import inspection
from services.agent.inspector import Inspector, inspect_once
from services.agent.records import Records
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents

GROUP = "inspection"
SOURCE = "/agentiad/agent"
CAPTURED_TYPE = topics.TOPICS[topics.IMAGES].message.DESCRIPTOR.full_name
INSPECTION_TYPE = topics.TOPICS[topics.INSPECTIONS].message.DESCRIPTOR.full_name


async def run(
    bus: Bus,
    inspector: Inspector,
    records: Records[events_pb2.InspectionCompleted],
    *,
    max_in_flight: int,
    stop: asyncio.Event,
) -> None:
    """Inspects image events, `max_in_flight` episodes at once, until `stop` is set."""

    async def handle(event: Event) -> None:
        attributes = cloudevents.parse(event.headers, CAPTURED_TYPE)
        captured = inspection.parse_captured(event.value)
        with telemetry.bind(event_id=captured.event_id, episode_id=captured.event_id):
            result = await inspect_once(inspector, records, captured)
            headers = cloudevents.headers(
                result.event_id,
                INSPECTION_TYPE,
                SOURCE,
                result.completed_at.ToDatetime(tzinfo=UTC),
                attributes.traceparent,
            )
            await bus.publish(topics.INSPECTIONS, result.line, result.SerializeToString(), headers)
            telemetry.log.info(
                "inspected",
                line=result.line,
                decision=events_pb2.Decision.Name(result.decision),
                attempt=event.attempt,
            )

    await bus.consume([topics.IMAGES], GROUP, handle, max_in_flight=max_in_flight, stop=stop)
