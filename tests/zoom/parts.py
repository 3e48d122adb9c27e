"""Parts, exemplars and known motions for the tests of zoom."""

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.images import ImageStore

DATA = Path(__file__).parents[3] / "shared" / "data"
Matrix = npt.NDArray[np.float64]


def make_board(seed: int = 0, side: int = 384, missing: int | None = None) -> Image.Image:
    """A plate with traces and 24 round pads, one of them missing. The same seed gives the same design."""
    rng = np.random.default_rng(seed)
    board = np.full((side, side, 3), (96, 120, 88), np.uint8)
    for _ in range(10):
        x, y, length = (int(v) for v in rng.integers(0, side, 3))
        end = (x + length, y) if rng.uniform() < 0.5 else (x, y + length)
        cv2.line(board, (x, y), end, (150, 160, 120), max(1, side // 96))
    for index, (x, y) in enumerate(pads(seed, side)):
        if index != missing:
            cv2.circle(board, (x, y), side // 32, (230, 225, 215), -1, cv2.LINE_AA)
    return Image.fromarray(board)


def pads(seed: int, side: int) -> list[tuple[int, int]]:
    """Where make_board puts its pads, in pixels."""
    rng = np.random.default_rng(seed + 1000)
    # 24 of the 36 cells of a grid, so that no two overlap, each at its own place in its cell.
    cells = rng.permutation(36)[:24]
    at = (np.column_stack([cells % 6, cells // 6]) + rng.uniform(0.35, 0.65, (24, 2))) * 0.125 + 0.125
    return [(int(x), int(y)) for x, y in at * side]


def make_motion(side: int, angle: float = 0.0, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> Matrix:
    """2x3 from exemplar pixels to part pixels: about the centre, angle in degrees, shift in pixels."""
    middle = (side - 1) / 2
    motion: Matrix = cv2.getRotationMatrix2D((middle, middle), angle, scale)
    motion[:, 2] += shift
    return motion


def moved(
    image: Image.Image, motion: Matrix, gain: float = 1.0, offset: float = 0.0, noise: float = 0.0
) -> Image.Image:
    """The image after the motion, under another light."""
    pixels = cv2.warpAffine(np.asarray(image), motion, image.size, borderMode=cv2.BORDER_REFLECT).astype(np.float64)
    pixels = gain * pixels + offset + np.random.default_rng(0).normal(0.0, noise, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def misplaced(found: Matrix, motion: Matrix, side: int) -> float:
    """The largest distance in pixels, over the corners and the middle, between a registration and the truth."""
    truth = cv2.invertAffineTransform(motion)
    points = np.array([[0, 0], [side, 0], [0, side], [side, side], [side / 2, side / 2]], np.float64)
    difference = points @ (found - truth)[:, :2].T + (found - truth)[:, 2]
    return float(np.linalg.norm(difference, axis=1).max())


def stored(store: ImageStore, image: Image.Image) -> pb.Image:
    """A reference to the image, written to the store."""
    return pb.Image(reference=store.put(image))
