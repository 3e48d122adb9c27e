"""Crops as the policy asks for them.

Invariants: a region never leaves the image; its aspect is kept; the same image and box always give the same pixels.
A box that the policy got wrong raises ToolError with a sentence that tells it how to mend the call.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

# x_min, y_min, x_max, y_max, each in [0, 1] of the image's width or height.
Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


class ToolError(Exception):
    """The policy's call was wrong; the text is a sentence for the policy."""


@dataclass(frozen=True)
class CropParameters:
    """How crops are cut and drawn.

    `padding` and `min_region_px` are AgentIAD's as its public training code runs.
    `min_output_px` is 8 patches of 28 px: under it a Qwen-VL tower sees a crop in too few tokens to tell small marks
    apart. `max_output_pixels` is 1,280 tokens of 28x28 px, the upper bound that Qwen2.5-VL's card recommends.
    """

    padding: float = 0.1  # of the image's width (left, right) and height (top, bottom)
    min_region_px: int = 28  # smallest side of a padded region, in source pixels
    min_output_px: int = 224  # shorter side of the output; smaller crops are up-sampled
    max_output_pixels: int = 1280 * 28 * 28  # width times height of the output; wins over min_output_px


DEFAULTS = CropParameters()


@dataclass(frozen=True)
class Cut:
    """A padded region of an image of a known size."""

    pixels: tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside
    region: Region  # the same, normalised


def crop(image: Image.Image, box: Sequence[float], parameters: CropParameters = DEFAULTS) -> tuple[Image.Image, Region]:
    """Cut the padded box out of the image and draw it at a size the policy can read.

    Returns the crop in the image's own mode and the region that it shows. Raises ToolError.
    """
    cut = cut_of(image.size, box, parameters)
    return fit(image.crop(cut.pixels), parameters), cut.region


def cut_of(size: tuple[int, int], box: Sequence[float], parameters: CropParameters = DEFAULTS) -> Cut:
    """The pixels to read for a box in an image of size (width, height). Raises ToolError."""
    x_min, y_min, x_max, y_max = validated(box)
    left, right = _padded(x_min, x_max, size[0], parameters.padding)
    top, bottom = _padded(y_min, y_max, size[1], parameters.padding)
    smallest = min(right - left, bottom - top)
    if smallest < parameters.min_region_px:
        raise ToolError(
            f"The region is only {smallest} pixels on its shorter side and {parameters.min_region_px} are needed; "
            "give a larger bbox_2d."
        )
    width, height = size
    return Cut((left, top, right, bottom), (left / width, top / height, right / width, bottom / height))


def validated(box: Sequence[float]) -> Region:
    """The box as four floats. Raises ToolError unless they are finite, in [0, 1] and of positive width and height."""
    if len(box) != 4:
        raise ToolError(f"bbox_2d has {len(box)} numbers; give exactly four: [x1, y1, x2, y2].")
    x_min, y_min, x_max, y_max = (float(value) for value in box)
    values = (x_min, y_min, x_max, y_max)
    if not all(math.isfinite(value) for value in values):
        raise ToolError("bbox_2d holds a value that is not a finite number; give [x1, y1, x2, y2] between 0 and 1.")
    if not all(0.0 <= value <= 1.0 for value in values):
        raise ToolError(
            "bbox_2d lies outside the image; coordinates are fractions of its width and height, between 0 and 1."
        )
    if x_min >= x_max or y_min >= y_max:
        raise ToolError("bbox_2d is empty or reversed; x1 must be smaller than x2 and y1 smaller than y2.")
    return values


def output_size(size: tuple[int, int], parameters: CropParameters = DEFAULTS) -> tuple[int, int]:
    """The size (width, height) at which a region of `size` pixels is drawn; the aspect is kept to the pixel."""
    width, height = size
    scale = max(1.0, parameters.min_output_px / min(width, height))
    scale = min(scale, math.sqrt(parameters.max_output_pixels / (width * height)))
    return _scaled(width, scale), _scaled(height, scale)


def fit(image: Image.Image, parameters: CropParameters = DEFAULTS) -> Image.Image:
    """Draw the image at its output size.

    Shrinking averages every source pixel (box filter), so that a thin line fades but never falls between samples.
    """
    size = output_size(image.size, parameters)
    if size == image.size:
        return image
    shrinks = size[0] < image.width
    return image.resize(size, Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC)


def _padded(low: float, high: float, extent: int, padding: float) -> tuple[int, int]:
    # Outwards to whole pixels. The epsilon keeps float32 boxes (0.3 arrives as 0.30000001) from gaining a pixel.
    epsilon = 1e-6 * extent
    first = math.floor((low - padding) * extent + epsilon)
    last = math.ceil((high + padding) * extent - epsilon)
    return max(0, first), min(extent, last)


def _scaled(extent: int, scale: float) -> int:
    # Down, so that the product stays within the budget; the epsilon keeps exact ratios exact.
    return max(1, math.floor(extent * scale + 1e-6))
