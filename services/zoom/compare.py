"""Comparisons of a part with a normal exemplar, registered to it.

Invariants: both views show the same region as crop would for the same box, at the same size; the difference is taken at
full resolution before anything is shrunk, so that a thin mark survives; where the exemplar has no pixels, the composite
shows no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
from PIL import Image

from services.zoom import crop
from services.zoom.registration import Registration, register, warp

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
    expected = registration.gain * theirs.astype(np.float32) + registration.offset
    off = np.abs(ours - np.clip(expected, 0, 255)).max(axis=2)
    difference = np.where(inside, np.round(off), 0).astype(np.uint8)
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
    size = (right - left, bottom - top)
    matrix = registration.matrix.copy()
    matrix[:, 2] += matrix[:, :2] @ np.array([left, top], np.float64)
    ours = np.asarray(part.crop(cut.pixels).convert("RGB"))
    theirs = warp(np.asarray(exemplar.convert("RGB")), matrix, size)
    inside = warp(np.full(exemplar.size[::-1], 255, np.uint8), matrix, size) == 255
    return ours, theirs, inside


def _grey(pixels: Pixels) -> Pixels:
    return np.asarray(Image.fromarray(pixels).convert("L"))
