"""What the image store answers to hostile bytes: each case by name, with its documented outcome."""

import zlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from PIL import Image as PilImage
from PIL import ImageCms

from agentiad.v1.trajectory_pb2 import Image
from services.chassis.decoding import ImageLimits
from services.chassis.errors import BadInput
from services.chassis.images import ImageStore
from tests.chassis.hostile import MAX_BYTES, UPRIGHT, Accepted, Outcome, Refused, check
from tests.chassis.make_images import (
    encode,
    make_bmp_header,
    make_bytes,
    make_frames,
    make_jpeg_sized,
    make_noise,
    make_picture,
    make_png,
    make_png_rows,
    make_tiff_tag,
    make_turned,
    png_chunk,
)

# Pillow warns of much that is refused a moment later.
pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("ignore:::PIL")]

UNREADABLE = Refused(BadInput, "not a PNG, JPEG, WebP, BMP or TIFF image")
BROKEN = Refused(BadInput, "broken image")
FRAMES = Refused(BadInput, "several frames or pages")


def make_zip_bomb() -> bytes:
    buffer = BytesIO()
    with ZipFile(buffer, "w", ZIP_DEFLATED) as archive:
        archive.writestr("bomb.png", bytes(20_000_000))
    return buffer.getvalue()


def make_palette(transparent: bool) -> bytes:
    image = PilImage.new("P", (48, 32), 1)
    image.putpalette([0, 0, 0, 200, 40, 10])
    return encode(image, "PNG", **({"transparency": 1} if transparent else {}))


def make_cmyk(file_format: str) -> bytes:
    return encode(PilImage.new("CMYK", (48, 32), (0, 255, 255, 0)), file_format)


def make_lab() -> bytes:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    image = ImageCms.applyTransform(make_picture(), to_lab)
    assert image is not None
    return encode(image, "TIFF")


def make_mpo() -> bytes:
    return encode(make_picture(), "MPO", save_all=True, append_images=[make_noise(48, 32)], quality=95)


def cut(data: bytes, share: float = 0.5) -> bytes:
    return data[: int(len(data) * share)]


def noise(file_format: str) -> bytes:
    return encode(make_noise(48, 32), file_format)


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


TEXT_BOMB = png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(50_000_000)))
PROFILE_BOMB = png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(50_000_000)))
ROWS = (b"\0" + b"\x0a\x14\x1e" * 48) * 32

BYTES: dict[str, tuple[Callable[[], bytes], Outcome]] = {
    # Not pictures, or not of a format that is accepted.
    "empty": (lambda: b"", Refused(BadInput, "empty")),
    "one byte": (lambda: b"\x89", UNREADABLE),
    "HTML": (lambda: b"<!doctype html><html><body>404 Not Found</body></html>", UNREADABLE),
    "SVG with an entity": (
        lambda: b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a SYSTEM "/etc/passwd">]><svg/>',
        UNREADABLE,
    ),
    "PostScript": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 48 32\n%%EndComments\n", UNREADABLE),
    "ZIP bomb": (make_zip_bomb, UNREADABLE),
    "GIF": (lambda: make_bytes("GIF"), UNREADABLE),
    "animated GIF": (lambda: make_frames("GIF"), UNREADABLE),
    "PPM": (lambda: make_bytes("PPM"), UNREADABLE),
    "JPEG 2000": (lambda: make_bytes("JPEG2000"), UNREADABLE),
    "AVIF": (lambda: make_bytes("AVIF"), UNREADABLE),
    "ICO": (lambda: make_bytes("ICO"), UNREADABLE),
    # More than one picture.
    "animated WebP": (lambda: make_frames("WEBP"), FRAMES),
    "animated PNG": (lambda: make_frames("PNG"), FRAMES),
    "TIFF of three pages": (lambda: make_frames("TIFF"), FRAMES),
    "JPEG with MPF previews: its first picture": (make_mpo, UPRIGHT),
    # Cut off or damaged.
    "truncated PNG": (lambda: cut(noise("PNG")), BROKEN),
    "truncated JPEG": (lambda: cut(noise("JPEG")), BROKEN),
    "JPEG without its last hundred bytes": (lambda: noise("JPEG")[:-100], BROKEN),
    "truncated WebP": (lambda: cut(noise("WEBP")), Refused(BadInput, "")),
    "truncated BMP": (lambda: cut(noise("BMP")), BROKEN),
    "truncated TIFF": (lambda: cut(noise("TIFF")), Refused(BadInput, "")),
    "PNG: header only": (lambda: make_bytes("PNG")[:33], Refused(BadInput, "")),
    "PNG: wrong checksum in the header": (lambda: flipped(make_bytes("PNG"), 18), Refused(BadInput, "")),
    "PNG: pixels are no zlib stream": (lambda: flipped(make_bytes("PNG"), 41), Refused(BadInput, "broken image")),
    "PNG: fewer rows than promised, orderly ended: the others are black": (
        lambda: make_png(48, 64, idat=ROWS),
        Accepted((48, 64), pixel=(0, 0, 0)),
    ),
    "PNG: more rows than promised": (lambda: make_png(48, 16, idat=ROWS), Accepted((48, 16), pixel=(10, 20, 30))),
    "PNG: no pixels": (lambda: make_png(48, 32), BROKEN),
    "PNG: width 0": (lambda: make_png(0, 32), Refused(BadInput, "")),
    "PNG: colour type that there is not": (lambda: make_png(48, 32, colour=5), Refused(BadInput, "")),
    "TIFF: strips beyond the file": (lambda: make_tiff_tag(make_bytes("TIFF"), 273, 2**31), BROKEN),
    "TIFF: a strip said to be longer than the file": (lambda: make_tiff_tag(make_bytes("TIFF"), 279, 2**31), UPRIGHT),
    "TIFF: unknown compression": (lambda: make_tiff_tag(make_bytes("TIFF"), 259, 59999), Refused(BadInput, "")),
    # Sizes.
    "1×1": (lambda: make_bytes("PNG", 1, 1), Refused(BadInput, "1×1 pixels: a side must have 8 at least")),
    "7 high": (lambda: make_bytes("PNG", 100, 7), Refused(BadInput, "a side must have 8 at least")),
    "8×8": (lambda: make_bytes("PNG", 8, 8), Accepted((8, 8), "rgbw")),
    "20,000 wide": (lambda: make_bytes("PNG", 20_000, 64), Accepted((20_000, 64), "rgbw")),
    "40,000 wide": (lambda: make_png(40_000, 64), Refused(BadInput, "a side can have 32768 at most")),
    "PNG bomb: a promise of 70 megapixels": (lambda: make_png(10_000, 7_000), Refused(BadInput, "more than the limit")),
    "PNG bomb: 130 megapixels of zeros": (
        lambda: make_png(13_000, 10_000, idat=bytes(20_000_000)),
        Refused(BadInput, "more than the limit"),
    ),
    "PNG bomb: a promise of 400 megapixels": (
        lambda: make_png(20_000, 20_000),
        Refused(BadInput, "more pixels than the limit"),
    ),
    "PNG bomb: a promise of 2³¹ × 2³¹": (lambda: make_png(2**31 - 1, 2**31 - 1), Refused(BadInput, "")),
    "JPEG bomb: a promise of 65,500²": (
        lambda: make_jpeg_sized(65_500, 65_500),
        Refused(BadInput, "pixels than the limit"),
    ),
    "BMP bomb: a promise of 60,000 × 1,000": (
        lambda: make_bmp_header(60_000, 1_000),
        Refused(BadInput, "a side can have"),
    ),
    "BMP bomb: height −2³¹": (lambda: make_bmp_header(1_000, -(2**31)), Refused(BadInput, "")),
    "TIFF bomb: a promise of 30,000²": (
        lambda: make_tiff_tag(make_tiff_tag(make_bytes("TIFF"), 256, 30_000), 257, 30_000),
        Refused(BadInput, "pixels than the limit"),
    ),
    "PNG bomb: text that unpacks to 50 MB": (lambda: make_png(48, 32, idat=ROWS, extra=TEXT_BOMB), BROKEN),
    "PNG bomb: profile that unpacks to 50 MB": (
        lambda: make_png(48, 32, idat=ROWS, extra=PROFILE_BOMB),
        BROKEN,
    ),
    "more bytes than the limit": (
        lambda: make_bytes("BMP") + bytes(MAX_BYTES),
        Refused(BadInput, "limit of 4194304 bytes"),
    ),
    # Pixels of other kinds.
    "CMYK JPEG": (lambda: make_cmyk("JPEG"), Accepted(pixel=(255, 0, 0))),
    "CMYK TIFF": (lambda: make_cmyk("TIFF"), Accepted(pixel=(255, 0, 0))),
    "16-bit grey PNG: from its full range": (
        lambda: make_png_rows(48, 32, depth=16, colour=0, pixel=b"\x80\x00"),
        Accepted(pixel=(128, 128, 128)),
    ),
    "12-bit values in a 16-bit PNG: not stretched": (
        lambda: make_png_rows(48, 32, depth=16, colour=0, pixel=b"\x0f\xff"),
        Accepted(pixel=(15, 15, 15)),
    ),
    "16-bit grey TIFF": (
        lambda: encode(PilImage.new("I;16", (48, 32), 0xC000), "TIFF"),
        Accepted(pixel=(192, 192, 192)),
    ),
    "16-bit grey TIFF, big-endian": (
        lambda: encode(PilImage.new("I;16B", (48, 32), 0xC000), "TIFF"),
        Accepted(pixel=(192, 192, 192)),
    ),
    "16-bit RGB PNG": (
        lambda: make_png_rows(48, 32, depth=16, colour=2, pixel=b"\x10\xff\x20\xff\x30\xff"),
        Accepted(pixel=(16, 32, 48)),
    ),
    "16-bit RGBA PNG, half transparent": (
        lambda: make_png_rows(48, 32, depth=16, colour=6, pixel=b"\x00\x00\x00\x00\x00\x00\x80\x00"),
        Accepted(pixel=(127, 127, 127)),
    ),
    "32-bit integers": (
        lambda: encode(PilImage.new("I", (48, 32), 70_000), "TIFF"),
        Refused(BadInput, "mode I: only 8-bit"),
    ),
    "floats": (lambda: encode(PilImage.new("F", (48, 32), 0.5), "TIFF"), Refused(BadInput, "mode F: only 8-bit")),
    "LAB": (make_lab, Refused(BadInput, "mode LAB: only 8-bit")),
    "1-bit": (lambda: encode(PilImage.new("1", (48, 32), 1), "PNG"), Accepted(pixel=(255, 255, 255))),
    "grey JPEG": (lambda: encode(PilImage.new("L", (48, 32), 90), "JPEG"), Accepted(pixel=(90, 90, 90))),
    "grey with alpha: on white": (
        lambda: encode(PilImage.new("LA", (48, 32), (0, 0)), "PNG"),
        Accepted(pixel=(255, 255, 255)),
    ),
    "palette": (lambda: make_palette(False), Accepted(pixel=(200, 40, 10))),
    "palette with a transparent colour: on white": (lambda: make_palette(True), Accepted(pixel=(255, 255, 255))),
    "transparent PNG: on white": (
        lambda: encode(PilImage.new("RGBA", (48, 32), (0, 0, 0, 0)), "PNG"),
        Accepted(pixel=(255, 255, 255)),
    ),
    "half transparent WebP: on white": (
        lambda: encode(PilImage.new("RGBA", (48, 32), (0, 0, 0, 128)), "WEBP", lossless=True),
        Accepted(pixel=(127, 127, 127)),
    ),
    "grey with one transparent value: on white": (
        lambda: encode(PilImage.new("L", (48, 32), 7), "PNG", transparency=7),
        Accepted(pixel=(255, 255, 255)),
    ),
    # Odd, and nothing wrong with them.
    "progressive JPEG": (lambda: make_bytes("JPEG", progressive=True, quality=95), UPRIGHT),
    "lossy WebP": (lambda: make_bytes("WEBP", quality=95), UPRIGHT),
    "LZW TIFF": (lambda: make_bytes("TIFF", compression="tiff_lzw"), UPRIGHT),
    "PNG with an archive behind it": (lambda: make_bytes("PNG") + make_zip_bomb(), UPRIGHT),
    "JPEG with a web page behind it": (lambda: make_bytes("JPEG", quality=95) + b"<script>alert(1)</script>", UPRIGHT),
    "broken EXIF is ignored": (lambda: make_bytes("JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), UPRIGHT),
    "orientation 0 is ignored": (lambda: make_turned("JPEG", 0), UPRIGHT),
    "orientation 9 is ignored": (lambda: make_turned("PNG", 9), UPRIGHT),
    "orientation 65535 is ignored": (lambda: make_turned("WEBP", 65535), UPRIGHT),
}

# How make_picture's corners ('rgbw' as stored) lie once upright, by EXIF 2.32's table of orientations.
TURNED = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}
for _format in ("JPEG", "PNG", "WEBP", "TIFF"):
    for _number, _corners in TURNED.items():
        _size = (48, 32) if _number <= 4 else (32, 48)
        BYTES[f"{_format} of orientation {_number}"] = (
            lambda file_format=_format, number=_number: make_turned(file_format, number),
            Accepted(_size, _corners),
        )


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore([str(tmp_path)], None, ImageLimits(max_bytes=MAX_BYTES))


@pytest.mark.parametrize("name", BYTES)
def test_bytes(name: str, store: ImageStore) -> None:
    make, outcome = BYTES[name]
    data = make()
    check(lambda: store.load(Image(content=data)), outcome)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_in_a_file(name: str, store: ImageStore, tmp_path: Path) -> None:
    make, outcome = BYTES[name]
    path = tmp_path / "case.png"
    path.write_bytes(make())
    check(lambda: store.load(Image(reference=store.describe(path))), outcome)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_any_damage_is_bad_input_or_a_picture(file_format: str, store: ImageStore) -> None:
    """Every byte of the header region and some of the rest turned over, and every length: never another error."""
    good = encode(make_noise(16, 16), file_format)
    damaged = [flipped(good, at) for at in (*range(min(len(good), 120)), *range(120, len(good), 37))]
    for data in (*damaged, *(good[:length] for length in range(0, len(good), 29))):
        with suppress(BadInput):
            assert store.load(Image(content=data)).mode == "RGB"
