"""Images, references and an encoder whose nearest neighbours can be told by eye."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from agentiad.v1.trajectory_pb2 import ImageReference

# Category names that would break out of a filter expression if they were pasted into one.
HOSTILE_CATEGORIES = [
    'a"', "a'", 'a" or id != "', "a' or 1 == 1 or '", 'x" or category_key like "%', "a\\", 'a\\" or 1==1', "%", "_",
    "{a}", "a\nb", "a; drop", "", " ", "ünïcode 螺丝", "🔩", "a" * 256, "null", "*", 'a" in ["a"] or "b" in ["b',
]  # fmt: skip


class MeanColours:
    """The mean colours of the four quarters: enough of an encoder to test what is around it."""

    name = "mean-colours"
    dimension = 12

    def __init__(self) -> None:
        self.batches: list[int] = []

    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        self.batches.append(len(images))
        quarters = np.stack([np.asarray(image.resize((2, 2), Image.Resampling.BOX), np.float32) for image in images])
        vectors = quarters.reshape(len(images), -1) + 1
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def make_picture(red: int, green: int = 0, blue: int = 0, side: int = 64) -> Image.Image:
    return Image.new("RGB", (side, side), (red, green, blue))


def make_reference(name: str) -> ImageReference:
    """A reference to an image that nobody will read."""
    digest = hashlib.sha256(name.encode()).hexdigest()
    return ImageReference(uri=f"file:///{name}.png", sha256=digest, media_type="image/png", width=640, height=480)


def make_vectors(count: int, dimension: int = 8, seed: int = 0) -> npt.NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
