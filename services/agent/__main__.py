"""Starts an agent: the Inspect call and a worker, of inspections or of rollouts, until SIGTERM."""

import asyncio
from functools import partial

from services.agent.settings import AgentSettings
from services.chassis import lifecycle, telemetry
from services.chassis.settings import load


async def main(settings: AgentSettings, stop: asyncio.Event) -> None:
    from redis.asyncio import Redis

    from agentiad.v1.events_pb2 import InspectionCompleted, TrajectoryCompleted
    from services.agent import inspector, online, rollout, service
    from services.agent.records import RESULT_TTL_S, ROLLOUT_TTL_S, Records
    from services.chassis import rpc
    from services.chassis.bus import make_bus

    bus = make_bus(settings)
    async with (
        Redis.from_url(settings.redis_url.get_secret_value(), socket_timeout=5, socket_connect_timeout=5) as redis,
        inspector.connected(settings) as connected,
        rpc.serve(
            settings.bind,
            [service.servicer(connected)],
            max_concurrent=settings.max_concurrent_rpcs,
            grace_s=settings.grace_s,
        ),
    ):
        try:
            if settings.work == "rollout":
                rollouts = Records(redis, TrajectoryCompleted, ROLLOUT_TTL_S)
                await rollout.run(bus, connected.runner, rollouts, max_in_flight=settings.max_in_flight, stop=stop)
            else:
                inspections = Records(redis, InspectionCompleted, RESULT_TTL_S)
                await online.run(bus, connected, inspections, max_in_flight=settings.max_in_flight, stop=stop)
        finally:
            await bus.close()


if __name__ == "__main__":
    settings = load(AgentSettings)
    telemetry.configure("agent", settings.log_level)
    lifecycle.run(partial(main, settings))
