"""The loaded policy versions, and which of them new requests meet.

    room ──▶ load ──▶ warming ──▶ current ──(a newer one takes over)──▶ retired ──(last request ended, idle)──▶ closed

Invariants: a version takes over only after it answered a warm-up request; a load that fails leaves the current version;
a request ends on the version that it began with; loads happen one after the other; no more than `kept` are in memory
(two while a load replaces the only one).
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis import telemetry
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from services.policy.engine import Engine, Host
from services.vlm.checkpoint import card_of, sha256_of

# A request of a version that makes room has so long to end; episodes take seconds.
_BUSY_S = 120.0


@dataclass(eq=False)
class _Version:
    engine: Engine
    sha256: str
    under_way: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    # The timer that closes it once it was idle for long enough; only retired versions have one.
    closing: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        if self.closing is not None:
            self.closing.cancel()
            self.closing = None


class Versions:
    """Belongs to one event loop.

    `kept`: versions loaded at once; `idle_s`: how long a retired one waits for the next turns of its episodes.
    """

    def __init__(self, host: Host, *, kept: int = 3, idle_s: float = 120.0) -> None:
        self._host, self._kept, self._idle_s = host, kept, idle_s
        # In the order in which they took over; the last one is current.
        self._versions: dict[str, _Version] = {}
        self._loading = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        # Set by the first error of an engine that is none of the documented ones: a bug, for the process to die of.
        self.failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

    @property
    def current(self) -> PolicyCard:
        """Raises Transient: none is loaded."""
        return self._current().engine.card

    @property
    def loaded(self) -> list[str]:
        """The loaded versions; the last one is current."""
        return list(self._versions)

    async def generate(
        self,
        messages: Sequence[pb.Message],
        sampling: pb.Sampling,
        version: str = "",
        deadline: float | None = None,
    ) -> pb.Generation:
        """On `version` (empty: the current one). Raises NotFound: it is not loaded; else as Engine.generate."""
        entry = self._versions.get(version) if version else self._current()
        if entry is None:
            raise NotFound(f"policy version {version!r} is not loaded")
        entry.under_way += 1
        entry.idle.clear()
        entry.stop_timer()
        try:
            return await entry.engine.generate(messages, sampling, deadline)
        except (BadInput, Exhausted, Transient):
            raise
        except Exception as error:
            if not self.failed.done():
                self.failed.set_result(error)
            raise
        finally:
            entry.under_way -= 1
            if not entry.under_way:
                entry.idle.set()
            self._close_unused()

    async def load(self, checkpoint: Path, *, sha256: str = "", version: str = "") -> PolicyCard:
        """Loads, warms up, takes over. A version that is loaded already just takes over again.

        `sha256`: of the safetensors files; empty: not checked. Raises BadInput: not a checkpoint, another sha256, a
        warm-up that fails, or a version that is loaded already with other weights; Transient or Exhausted: not now.
        """
        async with self._loading:
            found = await asyncio.to_thread(_digest, checkpoint)
            if sha256 and sha256 != found:
                raise BadInput(f"{checkpoint} has sha256 {found}, not {sha256}")
            name = version or _card(checkpoint, found).version
            loaded = self._versions.get(name)
            if loaded is None:
                await self._make_room()
                loaded = _Version(await self._open(checkpoint, name), found)
            elif loaded.sha256 != found:
                raise BadInput(f"policy version {name!r} is loaded already with other weights")
            self._take_over(loaded)
            return loaded.engine.card

    async def close(self) -> None:
        """Closes every version; what is under way fails with Transient."""
        for name in list(self._versions):
            self._close(name)
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._host.close()

    async def _make_room(self) -> None:
        """For one more: two of a large model's versions may be all that a GPU holds."""
        while len(self._versions) >= max(self._kept, 2):
            name, oldest = next(iter(self._versions.items()))
            del self._versions[name]  # its requests end; episodes that come with another turn begin anew
            try:
                if oldest.under_way:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_BUSY_S):
                            await oldest.idle.wait()
            finally:  # cancelled, too: nobody else knows of it any more
                self._close_engine(name, oldest)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _current(self) -> _Version:
        if not self._versions:
            raise Transient("no policy version is loaded")
        return next(reversed(self._versions.values()))

    async def _open(self, checkpoint: Path, name: str) -> Engine:
        """A loaded engine that has answered its warm-up."""
        engine = await self._host.open(checkpoint, name)
        try:
            await _warm_up(engine)
        except BaseException:  # cancelled, too: nobody else knows of this engine
            await engine.close()
            raise
        return engine

    def _take_over(self, version: _Version) -> None:
        name = version.engine.card.version
        version.stop_timer()
        self._versions.pop(name, None)
        self._versions[name] = version
        telemetry.log.info("policy version took over", version=name)
        self._close_unused()

    def _close_unused(self) -> None:
        """Closes retired versions that are beyond `kept`, and starts the timers of others that have become idle."""
        loop = asyncio.get_running_loop()
        for position, (name, entry) in enumerate(reversed(list(self._versions.items()))):
            if position == 0 or entry.under_way:
                continue
            if position >= self._kept or self._idle_s == 0:
                self._close(name)
            elif entry.closing is None:
                entry.closing = loop.call_later(self._idle_s, self._close, name)

    def _close(self, name: str) -> None:
        self._close_engine(name, self._versions.pop(name))

    def _close_engine(self, name: str, entry: _Version) -> None:
        entry.stop_timer()
        telemetry.log.info("policy version closed", version=name)
        task = asyncio.get_running_loop().create_task(entry.engine.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)


def _digest(checkpoint: Path) -> str:
    try:
        return sha256_of(checkpoint)
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error


def _card(checkpoint: Path, sha256: str) -> PolicyCard:
    try:
        return card_of(checkpoint, sha256)
    except (OSError, ValueError) as error:
        raise BadInput(str(error)) from error


async def _warm_up(engine: Engine) -> None:
    """The first forward of every kind (image, prompt, step) before anybody waits for it."""
    try:
        generation = await engine.generate(_warm_up_messages(), pb.Sampling(max_new_tokens=2))
        if not all(math.isfinite(value) for value in generation.log_probabilities):
            raise BadInput("its probabilities are not numbers")
    except (Exhausted, Transient):  # no fault of the version's: its host restarts, say
        raise
    except Exception as error:
        raise BadInput(f"policy version {engine.card.version!r} fails its warm-up: {error}") from error


def _warm_up_messages() -> list[pb.Message]:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "grey").save(buffer, "PNG")
    picture = pb.Segment(image=pb.Image(content=buffer.getvalue()))
    return [pb.Message(role=pb.ROLE_USER, segments=[picture, pb.Segment(text="?")])]
