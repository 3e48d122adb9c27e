"""What retrieval does: images in, vectors from the encoder, rows to and from the library."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Sequence

import numpy as np
from PIL import Image as Picture

from agentiad.v1.trajectory_pb2 import Image, ImageReference
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from services.retrieval.embedding import Embedder
from services.retrieval.library import Entry, ExemplarLibrary

MAX_ADDED = 1024
MAX_FOUND = 16
MAX_PAGE = 1000
_DEFAULT_PAGE = 100
# Embedded at once for one addition, so that it leaves room in the queue for those who ask.
_ADDED_AT_ONCE = 8
# Pixels of an image that waits for the encoder: more than any encoder looks at, and bounds what the queue holds.
_MAX_PIXELS = 2**20


class Catalogue:
    """Errors: BadInput, NotFound (an image), Exhausted (the encoder's queue), Transient (Milvus, a store)."""

    def __init__(self, store: ImageStore, embedder: Embedder, library: ExemplarLibrary) -> None:
        self._store, self._embedder, self._library = store, embedder, library

    async def add(self, category: str, images: Sequence[ImageReference]) -> int:
        """All or, if one of them cannot be read, none. Returns how many were new."""
        if not 1 <= len(images) <= MAX_ADDED:
            raise BadInput(f"1 to {MAX_ADDED} images can be added at once, not {len(images)}")
        vectors = []
        for start in range(0, len(images), _ADDED_AT_ONCE):
            some = images[start : start + _ADDED_AT_ONCE]
            vectors += await asyncio.gather(*(self._embedded(Image(reference=image), image.sha256) for image in some))
        return await asyncio.to_thread(self._library.add, category, images, np.stack(vectors))

    async def nearest(self, image: Image, category: str, limit: int) -> list[Entry]:
        """The exemplars most like the image, never the image itself. A known image is not read again."""
        if not 1 <= limit <= MAX_FOUND:
            raise BadInput(f"limit must be 1 to {MAX_FOUND}, not {limit}")
        by_content = image.WhichOneof("source") == "content"
        sha256 = hashlib.sha256(image.content).hexdigest() if by_content else image.reference.sha256
        vector = self._embedder.known(sha256)
        if vector is None:
            vector = await self._embedded(image, sha256)
        return await asyncio.to_thread(self._library.nearest, category, vector, limit, sha256)

    async def page(self, category: str, size: int, token: str) -> tuple[list[Entry], str]:
        """Entries, and the token of the next page (empty after the last). Size 0: the default."""
        if size > MAX_PAGE:
            raise BadInput(f"page_size can be {MAX_PAGE} at most, not {size}")
        return await asyncio.to_thread(self._library.page, category, size or _DEFAULT_PAGE, token)

    async def remove(self, category: str, sha256: Sequence[str]) -> int:
        """Some images of a category, or all of them. Returns how many were there."""
        return await asyncio.to_thread(self._library.remove, category, sha256)

    async def _embedded(self, image: Image, sha256: str) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return await self._embedder.embed(sha256, await asyncio.to_thread(self._read, image))

    def _read(self, image: Image) -> Picture.Image:
        picture = self._store.load(image)
        pixels = picture.width * picture.height
        if pixels <= _MAX_PIXELS:
            return picture
        factor = (_MAX_PIXELS / pixels) ** 0.5
        size = (max(1, int(picture.width * factor)), max(1, int(picture.height * factor)))
        return picture.resize(size, Picture.Resampling.BOX)
