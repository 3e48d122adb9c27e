"""Comparisons of a part with a normal exemplar, registered to it.

Invariants: both views show the same region as crop would for the same box, at the same size; the difference is taken at
full resolution before anything is shrunk, so that a thin mark survives; where the exemplar has no pixels, the composite
shows no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image

from services.zoom import crop
from services.zoom.registration import Matrix, Registration, register, warp

Pixels = npt.NDArray[np.uint8]


class View(StrEnum):
    SIDE_BY_SIDE = "side_by_side"  # the exemplar's same region as an image of its own
    COMPOSITE = "composite"  # one image: R part, G exemplar, B difference


@dataclass(frozen=True)
class Comparison:
    image: Image.Image  # RGB
    region: crop.Region  # of the part; the whole where nothing was registered
    registration: Registration


def compare(
    part: Image.Image,
    exemplar: Image.Image,
    box: Sequence[float] | None,
    view: View,
    registration: Registration | None = None,
    parameters: crop.CropParameters = crop.DEFAULTS,
) -> Comparison:
    """Draw the comparison; without a registration it is found first. Box None: the whole part. Raises ToolError.

    Below the confidence the image is the exemplar alone, whole and as it lies.
    """
    cut = _cut(part, box, parameters)
    found = registration or register(part, exemplar)
    if not found.registered:
        return Comparison(crop.fit(exemplar.convert("RGB"), parameters), crop.WHOLE, found)
    draw = composite if view is View.COMPOSITE else side_by_side
    return Comparison(draw(part, exemplar, found, box, parameters), cut.region, found)


def composite(
    part: Image.Image,
    exemplar: Image.Image,
    registration: Registration,
    box: Sequence[float] | None,
    parameters: crop.CropParameters = crop.DEFAULTS,
) -> Image.Image:
    """R = grey of the part, G = grey of the registered exemplar, B = |difference|. Raises ToolError.

    B is taken after the exemplar's light was brought to the part's (G stays as it is), and is the largest of the three
    colours' differences (of grey images: the difference), because a mark may differ in colour alone.
    """
    ours, theirs, inside = _aligned(part, exemplar, registration, _cut(part, box, parameters))
    light = np.clip(registration.gain * np.arange(256) + registration.offset, 0, 255).round().astype(np.uint8)
    per_colour = cv2.split(cv2.absdiff(ours, cv2.LUT(theirs, light)))
    difference = cv2.max(cv2.max(per_colour[0], per_colour[1]), per_colour[2])
    difference[~inside] = 0
    red = _grey(ours)
    green = np.where(inside, _grey(theirs), red)
    return crop.fit(Image.fromarray(np.dstack([red, green, difference])), parameters)


def side_by_side(
    part: Image.Image,
    exemplar: Image.Image,
    registration: Registration,
    box: Sequence[float] | None,
    parameters: crop.CropParameters = crop.DEFAULTS,
) -> Image.Image:
    """The exemplar's same region, to stand beside the part's; black where there is none. Raises ToolError."""
    _, theirs, _ = _aligned(part, exemplar, registration, _cut(part, box, parameters))
    return crop.fit(Image.fromarray(theirs), parameters)


def _cut(part: Image.Image, box: Sequence[float] | None, parameters: crop.CropParameters) -> crop.Cut:
    if box is None:
        return crop.Cut((0, 0, *part.size), crop.WHOLE)
    return crop.cut_of(part.size, box, parameters)


def _aligned(
    part: Image.Image, exemplar: Image.Image, registration: Registration, cut: crop.Cut
) -> tuple[Pixels, Pixels, npt.NDArray[np.bool_]]:
    """The part's region [h, w, 3], the exemplar drawn over it [h, w, 3], and where the exemplar has pixels [h, w]."""
    left, top, right, bottom = cut.pixels
    matrix = _from(registration.matrix, left, top)
    needed = _seen(matrix, (right - left, bottom - top), exemplar.size)
    matrix[:, 2] -= needed[:2]
    size = (right - left, bottom - top)
    ours = np.asarray(part.crop(cut.pixels).convert("RGB"))
    source = np.asarray(exemplar.crop(needed).convert("RGB"))
    theirs = warp(source, matrix, size)
    inside = warp(np.full(source.shape[:2], 255, np.uint8), matrix, size) == 255
    return ours, theirs, inside


def _from(matrix: Matrix, left: int, top: int) -> Matrix:
    """The matrix for pixels that are counted from (left, top) of the part."""
    return np.column_stack([matrix[:, :2], matrix @ np.array([left, top, 1.0])])


def _seen(matrix: Matrix, size: tuple[int, int], exemplar: tuple[int, int]) -> tuple[int, int, int, int]:
    """The box of the exemplar that a region of `size` shows, with a pixel more all around to interpolate from."""
    corners = np.array([[0, 0], [size[0], 0], [0, size[1]], size], np.float64)
    mapped = corners @ matrix[:, :2].T + matrix[:, 2]
    limit = np.array(exemplar)
    low = np.clip(np.floor(mapped.min(axis=0)) - 1, 0, limit - 1).astype(int)
    high = np.clip(np.ceil(mapped.max(axis=0)) + 2, low + 1, limit).astype(int)
    return int(low[0]), int(low[1]), int(high[0]), int(high[1])


def _grey(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).convert("L"))
