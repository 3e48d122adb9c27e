"""One event through its handler, to one of three ends: handled, in the retry topic, in the dead-letter topic."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace

from services.chassis.bus import Event, Handler, check_size
from services.chassis.bus.dispatcher import Dispatcher, Source
from services.chassis.bus.failures import Record, RetryPolicy, dead_letter, read_retry, retry_later
from services.chassis.errors import BadInput, Exhausted, Transient
from services.chassis.telemetry import log
from services.chassis.topics import retry

RETRY_SUFFIX = retry("")


class Delivery:
    """send: publishes a record durably."""

    def __init__(
        self, handler: Handler, group: str, policy: RetryPolicy, send: Callable[[Record], Awaitable[None]]
    ) -> None:
        self._handler = handler
        self._group = group
        self._policy = policy
        self._send = send

    def take(self, dispatcher: Dispatcher, read: Event) -> None:
        """Offer an event as it was read from a topic or its retry topic; another group's retries are skipped."""
        source = Source(read.topic, read.partition)
        if not read.topic.endswith(RETRY_SUFFIX):
            return dispatcher.offer(source, read.offset, read)
        retried = read_retry(read)
        if retried.group in ("", self._group):
            return dispatcher.offer(source, read.offset, retried.event, retried.not_before)
        return dispatcher.skip(source, read.offset)

    async def deliver(self, event: Event) -> None:
        """Raises what the handler raises beyond the three kinds (a bug), and what `send` raises."""
        try:
            check_size(event.key, event.value, event.headers)
            await self._call(event)
        except BadInput as error:
            await self._bury(event, error)

    async def _call(self, event: Event) -> None:
        for call in range(1, self._policy.in_place + 1):
            try:
                return await self._handler(event)
            except (Transient, Exhausted) as error:
                if event.attempt >= self._policy.max_attempts:
                    return await self._bury(event, error)
                if call == self._policy.in_place:
                    return await self._postpone(event, error)
            await asyncio.sleep(self._policy.pause_s(call))
            event = replace(event, attempt=event.attempt + 1)
        return None

    async def _bury(self, event: Event, error: Exception) -> None:
        log.warning("dead letter", **_describe(event, error))
        await self._send(dead_letter(event, error, self._group, time.time()))

    async def _postpone(self, event: Event, error: Exception) -> None:
        log.info("retry later", **_describe(event, error))
        delay_s = self._policy.delay_s(event.attempt)
        await self._send(retry_later(event, error, self._group, time.time(), delay_s))


def _describe(event: Event, error: Exception) -> dict[str, object]:
    return {
        "topic": event.topic,
        "partition": event.partition,
        "offset": event.offset,
        "attempt": event.attempt,
        "error": type(error).__name__,
        "reason": str(error),
    }
