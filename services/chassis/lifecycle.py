"""A process from start to stop: start → main(stop) runs → SIGTERM or SIGINT sets `stop` → main returns → exit status 0.

main imports the heavy packages itself, so that a signal that comes while they load is kept and obeyed right after.
A crash is logged and ends with exit status 1; SystemExit (wrong settings: 2) passes.
"""

import asyncio
import signal
import sys
from collections.abc import Awaitable, Callable

from services.chassis import telemetry


def run(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    """Run `main` until it returns. Once its event is set it closes what it opened, within its bounds, and returns."""
    try:
        asyncio.run(_with_signals(main))
    except Exception:
        telemetry.log.critical("crashed", exc_info=True)
        sys.exit(1)


async def _with_signals(main: Callable[[asyncio.Event], Awaitable[None]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, _request_stop, stop, number)
    await main(stop)


def _request_stop(stop: asyncio.Event, number: signal.Signals) -> None:
    telemetry.log.info("stopping", signal=number.name)
    stop.set()
