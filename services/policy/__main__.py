"""Starts the policy service, until SIGTERM."""

import asyncio
from functools import partial
from typing import Any

from services.chassis import lifecycle, telemetry
from services.chassis.settings import load
from services.policy.settings import PolicySettings

# A large model takes minutes to fetch and to load. After this, verdicts by the start checkpoint are better than none.
_SETTLE_S = 300.0


async def main(settings: PolicySettings, stop: asyncio.Event) -> None:
    from services.chassis import rpc
    from services.chassis.bus import make_bus
    from services.policy.following import follow
    from services.policy.service import opened, servicer

    async with opened(settings) as service:
        bus, settled = make_bus(settings), asyncio.Event()
        following = asyncio.create_task(follow(bus, settings.policy_name, service.load, stop, settled))
        settling, stopping = asyncio.create_task(settled.wait()), asyncio.create_task(stop.wait())
        # An engine that breaks takes the process along: the supervisor starts a fresh one.
        failed = service.versions.failed
        ends: list[asyncio.Future[Any]] = [following, stopping, failed]
        try:
            # Before the first request: it would meet an old version after each restart.
            await asyncio.wait([settling, *ends], timeout=_SETTLE_S, return_when=asyncio.FIRST_COMPLETED)
            if not any(end.done() for end in ends):
                async with rpc.serve(
                    settings.bind,
                    [servicer(service)],
                    max_concurrent=settings.max_concurrent_rpcs,
                    grace_s=settings.grace_s,
                ) as server:
                    current = service.versions.current.version
                    telemetry.log.info("ready", address=server.address, version=current, newest=settled.is_set())
                    await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if failed.done():
                raise failed.result()
            await following
        finally:
            for task in (following, settling, stopping):
                task.cancel()
            await bus.close()


if __name__ == "__main__":
    settings = load(PolicySettings)
    telemetry.configure("policy", settings.log_level)
    lifecycle.run(partial(main, settings))
