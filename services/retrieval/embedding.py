"""Vectors of images, from whoever asks at the same time, in batches.

Life of a request: known → answered from memory; asked for by another right now → waits with it; else queued (refused
when the queue is full) → taken by the one encoder thread with whatever else has queued → answered → remembered. A
request that is cancelled leaves its place in the queue taken; its vector is remembered for the next.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from services.chassis.errors import Exhausted

Vector = npt.NDArray[np.float32]


class Encoder(Protocol):
    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """[n, dimension], each of length 1, for n RGB images of any sizes. Blocks."""
        ...


class Embedder:
    """`async with` it: the thread that encodes lives as long as the block."""

    def __init__(self, encoder: Encoder, max_queued: int = 64, max_batch: int = 16, remembered: int = 16_384) -> None:
        """max_queued: images that wait, not counting the batch under way. remembered: vectors, a few KB each."""
        self._encoder = encoder
        self._max_queued, self._max_batch, self._max_known = max_queued, max_batch, remembered
        self._known: OrderedDict[str, Vector] = OrderedDict()
        self._asked: dict[str, asyncio.Future[Vector]] = {}
        self._queue: list[tuple[str, Image.Image]] = []
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Embedder:
        # Its own thread: calls that wait for Milvus must not keep the encoder waiting.
        self._thread = ThreadPoolExecutor(1, "encoder")
        self._worker = asyncio.create_task(self._run(), name="encoder")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._worker.cancel()
        await asyncio.wait([self._worker])
        self._thread.shutdown(cancel_futures=True)

    def known(self, sha256: str) -> Vector | None:
        """The remembered vector of the image with this digest."""
        vector = self._known.get(sha256)
        if vector is not None:
            self._known.move_to_end(sha256)
        return vector

    async def embed(self, sha256: str, image: Image.Image) -> Vector:
        """[dimension], of length 1. Exhausted: too many wait already."""
        if (vector := self.known(sha256)) is not None:
            return vector
        if (future := self._asked.get(sha256)) is None:
            if len(self._queue) >= self._max_queued:
                raise Exhausted(f"{self._max_queued} images wait for the encoder already")
            future = self._asked[sha256] = asyncio.get_running_loop().create_future()
            self._queue.append((sha256, image))
            self._arrived.set()
        # Shielded: somebody else may wait for the same one.
        return await asyncio.shield(future)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch, self._queue = self._queue[: self._max_batch], self._queue[self._max_batch :]
            if not self._queue:
                self._arrived.clear()
            images = [image for _, image in batch]
            try:
                vectors = await loop.run_in_executor(self._thread, self._encoder.embed, images)
            except Exception as error:
                # Raised again by everybody who waits for one of these; the next batch may do better.
                for sha256, _ in batch:
                    self._asked.pop(sha256).set_exception(error)
                continue
            for (sha256, _), vector in zip(batch, vectors, strict=True):
                self._asked.pop(sha256).set_result(vector)
                self._remember(sha256, vector)

    def _remember(self, sha256: str, vector: Vector) -> None:
        self._known[sha256] = vector
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)
