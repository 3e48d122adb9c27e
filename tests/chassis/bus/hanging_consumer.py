"""A consumer process to be killed: says on stdout what it was given, and never finishes it. Arguments: kind, place,
topic."""

import asyncio
import sys

from services.chassis.bus import Event
from tests.chassis.bus.stores import make_bus


async def hang(event: Event) -> None:
    print(event.value.decode(), flush=True)
    await asyncio.Event().wait()


kind, place, topic = sys.argv[1:]
asyncio.run(make_bus(kind, place).consume([topic], "g", hang, max_in_flight=1, stop=asyncio.Event()))
