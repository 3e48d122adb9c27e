"""Runs the handlers of one consume() call: shared by both buses, which only fetch, commit and keep membership.

Life of an event:  offer → (held until its not-before) → ready → running → done
Invariants: at most `max_in_flight` are running; events of a source leave `held` and `ready` in offset order; what is
not done keeps its source's watermark down, so it comes again. All methods belong to the event loop's thread.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from services.chassis.bus import Event
from services.chassis.bus.watermark import Watermark

# Events waiting in memory, so that handlers never wait for a fetch. It is also kafka-python's default poll size.
PREFETCH = 500


class Source(NamedTuple):
    """A partition as it is read: the topic may be a retry topic."""

    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Item:
    """not_before: Unix seconds, 0 = at once."""

    source: Source
    offset: int
    event: Event
    not_before: float
    watermark: Watermark


class Dispatcher:
    """deliver: runs one event to its end (handled, retry topic or dead letter); what it raises is a bug."""

    def __init__(self, deliver: Callable[[Event], Coroutine[Any, Any, None]], max_in_flight: int) -> None:
        self._deliver = deliver
        self._max_in_flight = max_in_flight
        self._loop = asyncio.get_running_loop()
        self._watermarks: dict[Source, Watermark] = {}
        self._committed: dict[Source, int] = {}
        self._held: dict[Source, deque[Item]] = {}
        self._ready: deque[Item] = deque()
        self._running: dict[asyncio.Task[None], Item] = {}
        self._changed = asyncio.Event()
        self._stopping = False
        self.failure: BaseException | None = None

    @property
    def room(self) -> int:
        """How many more events to fetch."""
        return max(0, PREFETCH - len(self._ready))

    @property
    def held(self) -> Iterable[Source]:
        """Sources whose next event is not due yet: fetch nothing more from them."""
        return self._held.keys()

    def offer(self, source: Source, offset: int, event: Event, not_before: float = 0.0) -> None:
        """Offsets of a source must rise."""
        watermark = self._start(source, offset)
        item = Item(source, offset, event, not_before, watermark)
        if source in self._held:
            self._held[source].append(item)
        elif not_before > time.time():
            self._held[source] = deque([item])
            self._loop.call_later(not_before - time.time(), self._release, source)
        else:
            self._ready.append(item)

    def skip(self, source: Source, offset: int) -> None:
        """An event that is none of this group's business."""
        self._start(source, offset).done(offset)

    def start(self) -> None:
        """Start what is ready, as far as there is room. Call it after a batch of offers."""
        while self._ready and len(self._running) < self._max_in_flight and self.failure is None:
            item = self._ready.popleft()
            task = self._loop.create_task(self._deliver(item.event))
            self._running[task] = item
            task.add_done_callback(self._finished)

    async def wait(self, timeout_s: float) -> None:
        """Until there is room again, a held source is due, or something failed; `timeout_s` at the most."""
        self._changed.clear()
        if self.failure is None:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._changed.wait()
            except TimeoutError:
                return

    def wake(self) -> None:
        self._changed.set()

    def uncommitted(self) -> dict[Source, int]:
        """What to commit: positions that have moved since `committed` was told."""
        positions = {source: mark.position for source, mark in self._watermarks.items()}
        return {s: p for s, p in positions.items() if p is not None and p != self._committed.get(s)}

    def committed(self, positions: dict[Source, int]) -> None:
        self._committed.update((s, p) for s, p in positions.items() if s in self._watermarks)

    def forget_committed(self) -> None:
        """A commit failed: count everything as uncommitted, so that the next one repeats it."""
        self._committed.clear()

    async def revoke(self, sources: Iterable[Source], grace_s: float) -> dict[Source, int]:
        """Drop what waits of these sources and give what runs `grace_s` to end, so that the next owner need not do it
        again. Returns the positions to commit; results that come later are dropped with the watermark."""
        gone = set(sources)
        for source in gone:
            self._held.pop(source, None)
        self._ready = deque(item for item in self._ready if item.source not in gone)
        tasks = [task for task, item in self._running.items() if item.source in gone]
        if tasks and grace_s > 0:
            await asyncio.wait(tasks, timeout=grace_s)
        positions = {s: p for s, p in self.uncommitted().items() if s in gone}
        self.forget(gone)
        return positions

    def forget(self, sources: Iterable[Source]) -> None:
        """The sources belong to another member already: nothing of them may be committed any more."""
        gone = set(sources)
        self._ready = deque(item for item in self._ready if item.source not in gone)
        for source in gone:
            self._held.pop(source, None)
            self._watermarks.pop(source, None)
            self._committed.pop(source, None)

    async def stop(self, grace_s: float) -> None:
        """Start nothing more; let what runs end within `grace_s`, then cancel it."""
        self._stopping = True
        self._ready.clear()
        self._held.clear()
        tasks = list(self._running)
        if not tasks:
            return
        if grace_s > 0:
            await asyncio.wait(tasks, timeout=grace_s)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _start(self, source: Source, offset: int) -> Watermark:
        watermark = self._watermarks.setdefault(source, Watermark())
        watermark.start(offset)
        return watermark

    def _finished(self, task: asyncio.Task[None]) -> None:
        item = self._running.pop(task)
        error = self._error(task)
        if error is None:
            if not task.cancelled():
                item.watermark.done(item.offset)
        elif self.failure is None:
            self.failure = error
        self.start()
        if len(self._ready) <= PREFETCH // 2 or self.failure is not None:
            self._changed.set()

    def _error(self, task: asyncio.Task[None]) -> BaseException | None:
        if not task.cancelled():
            return task.exception()
        # grpc.aio raises CancelledError out of a call that something else cancelled. Taken for our own cancellation,
        # the event would stay unfinished, without a word, until the next restart.
        return None if self._stopping else RuntimeError("a handler was cancelled from within")

    def _release(self, source: Source) -> None:
        """The first held event is due: let it and those behind it go, up to the next that is not."""
        held = self._held.pop(source, deque())
        while held and held[0].not_before <= time.time():
            self._ready.append(held.popleft())
        if held:
            self._held[source] = held
            self._loop.call_later(max(0.0, held[0].not_before - time.time()), self._release, source)
        self.start()
        self._changed.set()
