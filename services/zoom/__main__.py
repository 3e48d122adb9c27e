"""Starts zoom, until SIGTERM."""

import asyncio
from functools import partial

from services.chassis import lifecycle, telemetry
from services.chassis.settings import load
from services.zoom.settings import ZoomSettings


async def main(settings: ZoomSettings, stop: asyncio.Event) -> None:
    from services.chassis import rpc
    from services.zoom.service import hosted

    async with (
        hosted(settings) as servicer,
        rpc.serve(
            settings.bind, [servicer], max_concurrent=settings.max_concurrent_rpcs, grace_s=settings.grace_s
        ) as server,
    ):
        telemetry.log.info("ready", address=server.address)
        await stop.wait()


if __name__ == "__main__":
    settings = load(ZoomSettings)
    telemetry.configure("zoom", settings.log_level)
    lifecycle.run(partial(main, settings))
