"""Starts retrieval, until SIGTERM."""

import asyncio
import sys
from functools import partial

from services.chassis import lifecycle, telemetry
from services.chassis.settings import load
from services.retrieval.settings import RetrievalSettings


async def main(settings: RetrievalSettings, stop: asyncio.Event) -> None:
    from services.chassis import rpc
    from services.retrieval.library import LibraryError
    from services.retrieval.service import hosted

    try:
        async with (
            hosted(settings) as servicer,
            rpc.serve(
                settings.bind, [servicer], max_concurrent=settings.max_concurrent_rpcs, grace_s=settings.grace_s
            ) as server,
        ):
            telemetry.log.info("ready", address=server.address)
            await stop.wait()
    except LibraryError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    settings = load(RetrievalSettings)
    telemetry.configure("retrieval", settings.log_level)
    lifecycle.run(partial(main, settings))
