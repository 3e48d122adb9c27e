"""Messages and pictures for tests of the policy."""

from __future__ import annotations

import asyncio
import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import Exhausted
from services.policy.engine import Engine

GREEDY = pb.Sampling(max_new_tokens=16)
# Greedy, because a tiny random model then repeats itself and never ends its turn.
LONG = pb.Sampling(max_new_tokens=400)


def make_picture(seed: int, size: tuple[int, int] = (80, 64)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def make_image(seed: int, size: tuple[int, int] = (80, 64)) -> pb.Image:
    """A picture of noise, as content."""
    buffer = io.BytesIO()
    make_picture(seed, size).save(buffer, "PNG")
    return pb.Image(content=buffer.getvalue())


def make_reference(path: Path, seed: int, size: tuple[int, int] = (80, 64)) -> pb.Image:
    """The same picture in a file, as a reference."""
    make_picture(seed, size).save(path, "PNG")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return pb.Image(
        reference=pb.ImageReference(
            uri=path.as_uri(), sha256=digest, media_type="image/png", width=size[0], height=size[1]
        )
    )


def system(text: str) -> pb.Message:
    return pb.Message(role=pb.ROLE_SYSTEM, segments=[pb.Segment(text=text)])


def user(*parts: str | pb.Image) -> pb.Message:
    segments = [pb.Segment(text=part) if isinstance(part, str) else pb.Segment(image=part) for part in parts]
    return pb.Message(role=pb.ROLE_USER, segments=segments)


def assistant(*parts: str | Sequence[int]) -> pb.Message:
    segments = [
        pb.Segment(text=part) if isinstance(part, str) else pb.Segment(tokens=pb.TokenSequence(ids=part))
        for part in parts
    ]
    return pb.Message(role=pb.ROLE_ASSISTANT, segments=segments)


def opening(seed: int = 0, category: str = "bottle") -> list[pb.Message]:
    """An inspection's first prompt."""
    return [system("You inspect industrial parts."), user(make_image(seed), f"Image 1: {category}.")]


async def eventually(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when `condition` holds; fails after `seconds`."""
    for _ in range(int(seconds / 0.02)):
        if condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"it did not come true within {seconds} s")


async def fill(engine: Engine) -> list[asyncio.Task[pb.Generation]]:
    """Three long requests for two places: returns the two that were taken in."""
    tasks = [asyncio.create_task(engine.generate(opening(seed), LONG)) for seed in range(3)]
    done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    assert [type(task.exception()) for task in done] == [Exhausted]
    return list(pending)


async def free_again(engine: Engine) -> None:
    async with asyncio.timeout(30):
        while True:
            try:
                await engine.generate([user("hello")], pb.Sampling(max_new_tokens=1))
                return
            except Exhausted:
                await asyncio.sleep(0.01)
