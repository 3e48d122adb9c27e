"""Batches, memory and refusals of the embedder."""

import asyncio
import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from services.chassis.errors import Exhausted
from services.retrieval.embedding import Embedder
from tests.retrieval.exemplars import MeanColours, make_picture


class Held(MeanColours):
    """Encodes when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()
        self.begun = threading.Event()

    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        self.begun.set()
        assert self.let.wait(30)
        return super().embed(images)


async def test_what_has_queued_is_encoded_together() -> None:
    encoder = Held()
    async with Embedder(encoder, max_queued=64, max_batch=8) as embedder:
        first = asyncio.create_task(embedder.embed("0", make_picture(0)))
        await asyncio.to_thread(encoder.begun.wait, 30)
        others = [asyncio.create_task(embedder.embed(str(i), make_picture(i))) for i in range(1, 20)]
        await asyncio.sleep(0)  # each has queued now
        encoder.let.set()
        vectors = await asyncio.gather(first, *others)
    assert encoder.batches == [1, 8, 8, 3]
    expected = MeanColours().embed([make_picture(i) for i in range(20)])
    assert np.array_equal(np.stack(vectors), expected)


async def test_the_same_image_is_encoded_once() -> None:
    encoder = Held()
    async with Embedder(encoder) as embedder:
        asked = [asyncio.create_task(embedder.embed("same", make_picture(1))) for _ in range(5)]
        await asyncio.to_thread(encoder.begun.wait, 30)
        encoder.let.set()
        await asyncio.gather(*asked)
        await embedder.embed("same", make_picture(1))
    assert encoder.batches == [1]


async def test_a_full_queue_refuses_and_then_serves_again() -> None:
    encoder = Held()
    async with Embedder(encoder, max_queued=2) as embedder:
        asked = [asyncio.create_task(embedder.embed("0", make_picture(0)))]
        await asyncio.to_thread(encoder.begun.wait, 30)
        asked += [asyncio.create_task(embedder.embed(str(i), make_picture(i))) for i in (1, 2)]
        await asyncio.sleep(0)  # each has queued now
        with pytest.raises(Exhausted):
            await embedder.embed("3", make_picture(3))
        encoder.let.set()
        await asyncio.gather(*asked)
        assert (await embedder.embed("3", make_picture(3))).shape == (encoder.dimension,)


async def test_one_who_gives_up_takes_nobody_along() -> None:
    encoder = Held()
    async with Embedder(encoder) as embedder:
        leaves = asyncio.create_task(embedder.embed("same", make_picture(1)))
        stays = asyncio.create_task(embedder.embed("same", make_picture(1)))
        await asyncio.to_thread(encoder.begun.wait, 30)
        leaves.cancel()
        encoder.let.set()
        assert (await stays).shape == (encoder.dimension,)
        assert leaves.cancelled()


async def test_memory_is_bounded_and_drops_the_oldest() -> None:
    encoder = MeanColours()
    async with Embedder(encoder, remembered=2) as embedder:
        for name in ("a", "b", "c"):
            await embedder.embed(name, make_picture(ord(name)))
        assert embedder.known("a") is None
        assert embedder.known("b") is not None
        await embedder.embed("d", make_picture(0))
        assert embedder.known("c") is None  # b was used since


class Failing(MeanColours):
    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        if any(image.width == 1 for image in images):
            raise RuntimeError("out of memory")
        return super().embed(images)


async def test_a_failing_encoder_fails_its_batch_only() -> None:
    async with Embedder(Failing()) as embedder:
        with pytest.raises(RuntimeError, match="out of memory"):
            await embedder.embed("bad", make_picture(0, side=1))
        assert (await embedder.embed("good", make_picture(0))).shape == (12,)
