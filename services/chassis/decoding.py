"""From untrusted bytes to pixels, within limits. Everything wrong with the bytes is a BadInput that says what.

What comes out is always 8-bit RGB, upright (the EXIF orientation applied):
- alpha and transparent colours lie on white; palettes, 1-bit, grey, YCbCr and CMYK are converted (by plain formulas);
- 16-bit grey is scaled from its full range (65,535 is white), never stretched, so equal scenes give equal pixels;
- 32-bit integers, floats and LAB have no range that a viewer would agree on and are refused;
- colour profiles are not applied, as in the usual training pipelines.
Animations and several pages are refused: which one would be meant? (A JPEG with MPF previews is its first picture.)
"""

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from services.chassis.errors import BadInput, Exhausted

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "MPO": "image/jpeg",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
_OPENED = ("PNG", "JPEG", "WEBP", "BMP", "TIFF")
_WITHOUT_RANGE = {"I", "F", "LAB"}
# Above this many pixels Pillow itself warns, and above twice as many refuses; no limit of ours can be higher.
_PILLOW_MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3
# What its decoders let out on bytes that are not as they should be.
_PILLOW_RAISES = (
    *(OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError, EOFError, AttributeError),
    *(AssertionError, NotImplementedError, RecursionError, struct.error, zlib.error, Warning),
)
# EXIF's orientation → what makes the picture upright (EXIF 2.32, tag 0x0112).
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_CHANGE = {_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8]}
T = TypeVar("T")


@dataclass(frozen=True)
class ImageLimits:
    """What is accepted. ValueError for limits that Pillow's own do not allow."""

    max_bytes: int = 128 * 2**20  # encoded; an uncompressed 40-megapixel BMP fits
    max_pixels: int = 2**26  # 67 million: 200 MB as RGB; a line scan of 16,384 × 4,096 fits
    max_side: int = 32_768
    min_side: int = 8  # smaller ones show nothing, and 1×1 is how broken exporters say "no picture"

    def __post_init__(self) -> None:
        if self.max_pixels > _PILLOW_MAX_PIXELS:
            raise ValueError(f"max_pixels can be {_PILLOW_MAX_PIXELS} at most, not {self.max_pixels}")


@dataclass(frozen=True)
class Decoded:
    """`image`: RGB, upright, at 1/shrink of the sides. width, height: in pixels, upright, before shrinking."""

    media_type: str
    width: int
    height: int
    image: Image.Image


def media_type_of(data: bytes, limits: ImageLimits) -> str:
    """The media type, after everything has been checked that can be before pixels are decoded. BadInput."""
    return _guarded(lambda: _checked(_open(data), limits))


def decode(data: bytes, limits: ImageLimits, shrink: int = 1) -> Decoded:
    """Decode everything. shrink (1, 2, 4, 8): of a JPEG, 1/shrink of each side, rounded up. BadInput; Exhausted."""
    return _guarded(lambda: _decode(data, limits, shrink))


def _decode(data: bytes, limits: ImageLimits, shrink: int) -> Decoded:
    image = _open(data)
    media_type = _checked(image, limits)
    width, height = image.size
    if shrink > 1:
        image.draft(None, (width // shrink, height // shrink))
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image)
    rgb.info = {}  # what it says of the file no longer holds for these pixels
    if turn is None:
        return Decoded(media_type, width, height, rgb)
    upright = rgb.transpose(turn)
    if turn in _SIDES_CHANGE:
        width, height = height, width
    return Decoded(media_type, width, height, upright)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadInput("empty image")
    return Image.open(BytesIO(data), formats=_OPENED)


def _checked(image: Image.Image, limits: ImageLimits) -> str:
    width, height = image.size
    if max(width, height) > limits.max_side:
        raise BadInput(f"{width}×{height} pixels: a side can have {limits.max_side} at most")
    if min(width, height) < limits.min_side:
        raise BadInput(f"{width}×{height} pixels: a side must have {limits.min_side} at least")
    if width * height > limits.max_pixels:
        raise BadInput(f"{width}×{height} pixels: more than the limit of {limits.max_pixels}")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise BadInput("several frames or pages: send one picture")
    return MEDIA_TYPES[str(image.format)]


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 where there is none or EXIF is broken, as viewers take it."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _PILLOW_RAISES:
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _WITHOUT_RANGE:
        raise BadInput(f"pixels of mode {image.mode}: only 8-bit colour and 8- or 16-bit grey can be read")
    if image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.uint16)
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        above = image.convert("RGBA")
        result = Image.new("RGB", image.size, (255, 255, 255))
        result.paste(above, mask=above.getchannel("A"))
        return result
    return image.convert("RGB")


def _guarded(step: Callable[[], T]) -> T:
    """Run one step on untrusted bytes, whatever Pillow raises on them being a BadInput."""
    try:
        return step()
    except BadInput:
        raise
    except MemoryError as error:
        raise Exhausted("not enough memory to decode the image") from error
    except UnidentifiedImageError as error:
        raise BadInput("not a PNG, JPEG, WebP, BMP or TIFF image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadInput("far more pixels than the limit") from error
    except _PILLOW_RAISES as error:
        raise BadInput(f"broken image: {error}") from error
