"""Pictures, good and bad, as bytes."""

import struct
import zlib
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION_TAG = 0x0112


def make_picture(width: int = 48, height: int = 32) -> Image.Image:
    """RGB: red left-top, green right-top, blue left-bottom, white right-bottom, so that every turn shows."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[: height // 2, : width // 2] = (255, 0, 0)
    pixels[: height // 2, width // 2 :] = (0, 255, 0)
    pixels[height // 2 :, : width // 2] = (0, 0, 255)
    pixels[height // 2 :, width // 2 :] = (255, 255, 255)
    return Image.fromarray(pixels)


def make_noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """RGB noise: incompressible, so that cutting the file cuts pixels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def encode(image: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def make_bytes(file_format: str = "PNG", width: int = 48, height: int = 32, **options: Any) -> bytes:
    return encode(make_picture(width, height), file_format, **options)


def make_turned(file_format: str, orientation: int, width: int = 48, height: int = 32) -> bytes:
    """Stored pixels of make_picture with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION_TAG] = orientation
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if file_format == "JPEG" else {}
    options |= {"lossless": True} if file_format == "WEBP" else {}
    return make_bytes(file_format, width, height, exif=exif, **options)


def make_frames(file_format: str, count: int = 3) -> bytes:
    """An animation, or a file of several pages."""
    frames = [make_noise(32, 32, seed) for seed in range(count)]
    return encode(frames[0], file_format, save_all=True, append_images=frames[1:])


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def make_png(
    width: int, height: int, *, idat: bytes = b"", extra: bytes = b"", depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG chunk by chunk: its header can promise anything."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = png_chunk(b"IDAT", zlib.compress(idat, 9))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + extra + data + png_chunk(b"IEND", b"")


def make_png_rows(width: int, height: int, *, depth: int, colour: int, pixel: bytes) -> bytes:
    """A valid PNG of one colour in any depth and colour type."""
    return make_png(width, height, idat=(b"\0" + pixel * width) * height, depth=depth, colour=colour)


def make_bmp_header(width: int, height: int) -> bytes:
    """A BMP that promises width × height pixels and holds none."""
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info


def make_jpeg_sized(width: int, height: int) -> bytes:
    """A JPEG whose frame header promises width × height."""
    data = bytearray(make_bytes("JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def make_tiff_tag(data: bytes, tag: int, value: int) -> bytes:
    """A little-endian TIFF with one value of its first directory replaced."""
    result = bytearray(data)
    (offset,) = struct.unpack_from("<I", data, 4)
    (count,) = struct.unpack_from("<H", data, offset)
    for entry in range(offset + 2, offset + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, entry)[0] == tag:
            struct.pack_into("<HI", result, entry + 2, 4, 1)
            struct.pack_into("<I", result, entry + 8, value)
            return bytes(result)
    raise KeyError(tag)


def corners(image: Image.Image) -> str:
    """The colours of the four corners, left-top, right-top, left-bottom, right-bottom: 'rgbw' is upright."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w", (0, 0, 0): "k"}
    right, bottom = image.width - 3, image.height - 3
    picked = [image.getpixel(point) for point in ((2, 2), (right, 2), (2, bottom), (right, bottom))]
    return "".join(names.get(tuple(int(value > 127) for value in pixel), "?") for pixel in picked)  # type: ignore[union-attr]
