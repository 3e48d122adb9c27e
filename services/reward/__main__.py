"""Starts reward: the Score call and the worker, until SIGTERM."""

import asyncio
from functools import partial

from services.chassis import lifecycle, telemetry
from services.chassis.settings import load
from services.reward.settings import RewardSettings


async def main(settings: RewardSettings, stop: asyncio.Event) -> None:
    from redis.asyncio import Redis

    from services.chassis import rpc
    from services.chassis.bus import make_bus
    from services.reward import service, worker
    from services.reward.records import Records

    bus = make_bus(settings)
    async with (
        Redis.from_url(settings.redis_url.get_secret_value(), socket_timeout=5, socket_connect_timeout=5) as redis,
        rpc.serve(
            settings.bind,
            [service.servicer()],
            max_concurrent=settings.max_concurrent_rpcs,
            grace_s=settings.grace_s,
        ),
    ):
        try:
            await worker.run(bus, Records(redis), max_in_flight=settings.max_in_flight, stop=stop)
        finally:
            await bus.close()


if __name__ == "__main__":
    settings = load(RewardSettings)
    telemetry.configure("reward", settings.log_level)
    lifecycle.run(partial(main, settings))
