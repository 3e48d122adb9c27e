"""Starts the policy service, until SIGTERM."""

import asyncio
from functools import partial
from typing import Any

from services.chassis import lifecycle, telemetry
from services.chassis.settings import load
from services.policy.settings import PolicySettings


async def main(settings: PolicySettings, stop: asyncio.Event) -> None:
    from services.chassis import rpc
    from services.chassis.bus import make_bus
    from services.policy.following import follow
    from services.policy.service import opened, servicer

    async with (
        opened(settings) as service,
        rpc.serve(
            settings.bind,
            [servicer(service)],
            max_concurrent=settings.max_concurrent_rpcs,
            grace_s=settings.grace_s,
        ) as server,
    ):
        telemetry.log.info("ready", address=server.address, version=service.versions.current.version)
        bus = make_bus(settings)
        following = asyncio.create_task(follow(bus, settings.policy_name, service.load, stop))
        stopping = asyncio.create_task(stop.wait())
        try:
            # An engine that breaks takes the process along: the supervisor starts a fresh one.
            failed = service.versions.failed
            ends: list[asyncio.Future[Any]] = [following, stopping, failed]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
            await following
        finally:
            following.cancel()
            stopping.cancel()
            await bus.close()


if __name__ == "__main__":
    settings = load(PolicySettings)
    telemetry.configure("policy", settings.log_level)
    lifecycle.run(partial(main, settings))
