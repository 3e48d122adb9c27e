"""A rendered conversation as the engine sees it: ids, pixels, and the places where a stored prefix can end.

A boundary is named by a hash over everything before it: token ids verbatim, images by the sha256 of their encoded
bytes. The name depends on the content alone, not on how it was cut into chunks. Hashing needs no pixels, so a prompt
whose images lie in a stored prefix is answered without reading them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from agentiad.v1 import trajectory_pb2 as pb
from services.vlm.render import Chunk, ImageChunk, Renderer, TokenChunk

# Starts an image in the hashed stream; no token id is negative, so no sequence of ids can pose as an image.
_IMAGE = array("i", [-1]).tobytes()


@dataclass(frozen=True)
class Boundary:
    """A place in a prompt: `chunk` whole chunks and `offset` ids of the next one lie before it."""

    key: bytes
    chunk: int
    offset: int
    # A prefix worth storing ends here: an image follows, or the prompt ends.
    store: bool


@dataclass(frozen=True)
class Pixels:
    """One preprocessed image: `values` [patches, patch size], `grid` int64 [1, 3]."""

    values: torch.Tensor
    grid: torch.Tensor


@dataclass
class Prompt:
    """`boundaries` ascend and end with the end of the prompt. `hasher` has seen the whole prompt."""

    chunks: Sequence[Chunk]
    boundaries: Sequence[Boundary]
    hasher: Any
    pixels: dict[int, Pixels] = field(default_factory=dict)

    def images_from(self, boundary: Boundary | None) -> list[tuple[int, pb.Image]]:
        """The images at or after `boundary` (None: the start), with their chunk numbers."""
        start = boundary.chunk if boundary else 0
        return [(i, c.image) for i, c in enumerate(self.chunks) if i >= start and isinstance(c, ImageChunk)]


def make_prompt(chunks: Sequence[Chunk]) -> Prompt:
    """Raises ValueError: the prompt is empty or ends in an image, so there is no token to continue from."""
    if not chunks or not isinstance(chunks[-1], TokenChunk):
        raise ValueError("the prompt must end in text")
    hasher = hashlib.blake2b(digest_size=16)
    boundaries: list[Boundary] = []
    for index, chunk in enumerate(chunks):
        following = chunks[index + 1] if index + 1 < len(chunks) else None
        store = following is None or isinstance(following, ImageChunk)
        if isinstance(chunk, TokenChunk):
            # A generated turn is stored without its last id, which the model has not read yet (see `turn_key`).
            hasher.update(_bytes(chunk.ids[:-1]))
            boundaries.append(Boundary(hasher.digest(), index, len(chunk.ids) - 1, store=False))
            hasher.update(_bytes(chunk.ids[-1:]))
        else:
            hasher.update(_IMAGE + image_digest(chunk.image))
        boundaries.append(Boundary(hasher.digest(), index + 1, 0, store))
    return Prompt(chunks, boundaries, hasher)


def turn_key(prompt: Prompt, generated: Sequence[int]) -> bytes:
    """Names the prompt followed by `generated`."""
    hasher = prompt.hasher.copy()
    hasher.update(_bytes(generated))
    return bytes(hasher.digest())


def image_digest(image: pb.Image) -> bytes:
    """sha256 of the image's encoded bytes. Raises ValueError: there is no image, or its reference holds no digest."""
    if image.WhichOneof("source") == "content":
        return hashlib.sha256(image.content).digest()
    digest = bytes.fromhex(image.reference.sha256)
    if len(digest) != hashlib.sha256().digest_size:
        raise ValueError("an image reference without its sha256")
    return digest


def _bytes(ids: Iterable[int]) -> bytes:
    return array("i", ids).tobytes()


@dataclass(frozen=True)
class Suffix:
    """What the model must still read of a prompt. `stores`: (key, ids before it) of each boundary worth storing."""

    ids: list[int]
    images: list[Pixels]
    stores: list[tuple[bytes, int]]


def suffix_after(prompt: Prompt, boundary: Boundary | None, renderer: Renderer) -> Suffix:
    """The prompt from `boundary` (None: the start) on; at least its last id, whose successor is asked for.

    Every image after the boundary must have its pixels.
    """
    if boundary is not None and boundary.key == prompt.boundaries[-1].key:
        last = prompt.chunks[-1]
        assert isinstance(last, TokenChunk)  # make_prompt saw to it
        return Suffix([last.ids[-1]], [], [])
    start, offset = (boundary.chunk, boundary.offset) if boundary else (0, 0)
    stored_at = {b.chunk: b.key for b in prompt.boundaries if b.store}
    suffix = Suffix([], [], [])
    for index in range(start, len(prompt.chunks)):
        chunk = prompt.chunks[index]
        if isinstance(chunk, TokenChunk):
            suffix.ids.extend(chunk.ids[offset:] if index == start else chunk.ids)
        else:
            pixels = prompt.pixels[index]
            suffix.images.append(pixels)
            suffix.ids.extend([renderer.image_token_id] * renderer.image_tokens(pixels.grid[0]))
        if index + 1 in stored_at:
            suffix.stores.append((stored_at[index + 1], len(suffix.ids)))
    return suffix
