"""An engine whose model belongs to one thread: what all such engines share.

    generate ──prepare (threads: render, read pixels)──▶ arrivals ──▶ serve, in the engine's thread ──▶ deliver

The front lives in the caller's event loop; the thread owns the model and nothing else.
Invariant: `_places` counts the requests between `generate` and its answer; it never exceeds the given number.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Generic, Protocol, TypeVar

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis.errors import Exhausted, Transient

# Threads that render prompts and preprocess images beside the engine's.
_PREPARING_THREADS = 4

Outcome = pb.Generation | Exception


class Job(Protocol):
    """One request."""

    # Set by the front when nobody waits any more; a bool is written atomically.
    cancelled: bool

    @property
    def deliver(self) -> Callable[[Outcome], None]:
        """May be called from any thread; what comes after the first outcome is ignored."""
        ...


J = TypeVar("J", bound=Job)


class ThreadedEngine(ABC, Generic[J]):
    """See services.policy.engine.Engine. A subclass calls `_start` once it is ready to serve."""

    def __init__(self, card: PolicyCard, places: int) -> None:
        self.card = card
        self._limit, self._places = places, 0
        self._ended = False
        self._failure: Exception | None = None
        self._arrivals: queue.SimpleQueue[J | None] = queue.SimpleQueue()
        self._preparers = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="policy-prepare")
        self._thread = threading.Thread(target=self._run, name="policy-engine", daemon=True)

    @abstractmethod
    def _prepare(self, messages: Sequence[pb.Message], sampling: pb.Sampling, deliver: Callable[[Outcome], None]) -> J:
        """Everything that needs no model; called in threads. Raises BadInput or NotFound."""

    @abstractmethod
    def _serve(self) -> None:
        """Answers what `_receive` brings, until it returns False."""

    @abstractmethod
    def _unanswered(self) -> Iterable[J]:
        """The jobs received and not delivered when serving ended."""

    def _release(self) -> None:
        """Gives back what outlives the thread."""

    async def generate(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deadline: float | None = None
    ) -> pb.Generation:
        """See services.policy.engine.Engine."""
        if self._places >= self._limit:
            raise Exhausted(f"the policy already has {self._places} requests")
        self._places += 1
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return await self._generate(messages, sampling)
        except TimeoutError as error:
            raise Transient("the deadline has passed") from error
        finally:
            self._places -= 1

    async def close(self) -> None:
        """See services.policy.engine.Engine."""
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join)
        self._preparers.shutdown(wait=False)  # what it still prepares finds the engine closed
        await asyncio.to_thread(self._release)

    def _start(self) -> None:
        self._thread.start()

    async def _generate(self, messages: Sequence[pb.Message], sampling: pb.Sampling) -> pb.Generation:
        self._check_alive()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[pb.Generation] = loop.create_future()
        job = await loop.run_in_executor(
            self._preparers, self._prepare, messages, sampling, partial(_deliver, loop, answer)
        )
        self._arrivals.put(job)
        # After, not before: a job that came too late for the last sweep of `_run` sees here that it ended.
        self._check_alive()
        try:
            return await answer
        finally:
            job.cancelled = True  # no effect on a job that has been delivered

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the engine has failed") from self._failure
        if self._ended:
            raise Transient("this policy version is closed")

    def _run(self) -> None:
        try:
            self._serve()
            end: Exception = Transient("this policy version is closed")
        except BaseException as error:  # a bug or a broken device: whoever waits must hear of it, and so must who comes
            self._failure = end = error if isinstance(error, Exception) else RuntimeError(repr(error))
        self._ended = True
        for job in [*self._unanswered(), *_drain(self._arrivals)]:
            job.deliver(end)

    def _receive(self, waiting: list[J], block: bool) -> bool:
        """Moves arrivals to `waiting`; False once the engine is told to close."""
        while True:
            try:
                job = self._arrivals.get(block=block)
            except queue.Empty:
                return True
            if job is None:
                return False
            waiting.append(job)
            block = False


def _deliver(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[pb.Generation], outcome: Outcome) -> None:
    """Called in the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, answer, outcome)


def _resolve(answer: asyncio.Future[pb.Generation], outcome: Outcome) -> None:
    if answer.done():  # nobody waits any more
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _drain(arrivals: queue.SimpleQueue[J | None]) -> list[J]:
    jobs = []
    while not arrivals.empty():
        job = arrivals.get()
        if job is not None:
            jobs.append(job)
    return jobs
