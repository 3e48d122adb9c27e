"""Text, panels, pictures and frames on a Pillow image. Knows nothing of inspections.

Everything is drawn at twice the size at which it is usually looked at, so hairlines are 2 px and text starts at 20 px.
Pillow's built-in font is the only one: no font file is shipped. It is a Latin subset; `plain` writes the rest with
its base letters or a question mark.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import cast

from PIL import Image, ImageDraw, ImageFont

Rect = tuple[int, int, int, int]  # left, top, right, bottom; right and bottom are outside
Box = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max in [0, 1] of a picture
Size = tuple[int, int]

# Longer texts are cut before they are measured: a hostile one must not cost seconds.
_MAX_CHARACTERS = 1_000
_SMOOTH = 4  # shapes are drawn so many times larger, then averaged
_NEAREST_BELOW_PX = 64  # the pixels of smaller pictures are worth seeing
_SPELLED = str.maketrans({"×": "x", "–": "-", "—": "-", "−": "-", "→": ">", "≥": ">=", "≤": "<=", "ß": "ss", "µ": "u"})


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size))


def plain(text: str) -> str:
    """The text on one line, in characters that the font has."""
    letters = unicodedata.normalize("NFKD", text[:_MAX_CHARACTERS].translate(_SPELLED))
    kept = (c if c.isspace() or _has_glyph(c) else "?" for c in letters if not unicodedata.combining(c))
    return " ".join("".join(kept).split())


def width(text: str, size: int) -> float:
    return font(size).getlength(text)


def shorten(text: str, size: int, room: float) -> str:
    """The text, or as much of it as fits `room` pixels with an ellipsis."""
    text = plain(text)
    if width(text, size) <= room:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if width(text[:middle] + "…", size) <= room else (low, middle - 1)
    return text[:low].rstrip() + "…"


def wrap(text: str, size: int, room: float, lines: int) -> list[str]:
    """At most `lines` lines of at most `room` pixels; the last one ends in an ellipsis where the text is longer."""
    done: list[str] = []
    rest = plain(text)
    while rest and len(done) < lines - 1 and width(rest, size) > room:
        cut = _break_at(rest, size, room)
        done.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return [*done, shorten(rest, size, room)] if rest else done


def _break_at(text: str, size: int, room: float) -> int:
    """Where the line must end: after the last word that fits, inside a word that is longer than a line."""
    fits = max(1, len(shorten(text, size, room)) - 1)
    space = text.rfind(" ", 0, fits + 2)
    return space if space > 0 else fits


def contained(size: Size, room: Size) -> Size:
    """The largest size of the same aspect inside `room`; never less than a pixel."""
    scale = min(room[0] / size[0], room[1] / size[1])
    return max(1, min(room[0], round(size[0] * scale))), max(1, min(room[1], round(size[1] * scale)))


def resized(image: Image.Image, size: Size) -> Image.Image:
    """RGB at `size`: averaged when it shrinks, crisp pixels when it is tiny, smooth in between."""
    if size[0] >= image.width and max(image.size) < _NEAREST_BELOW_PX:
        return image.convert("RGB").resize(size, Image.Resampling.NEAREST)
    # The reducing gap keeps a photograph of 100 megapixels from being convolved whole.
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0).convert("RGB")


class Sheet:
    """A page to draw on; every position is in its pixels."""

    def __init__(self, size: Size, colour: str) -> None:
        self.image = Image.new("RGB", size, colour)
        self._draw = ImageDraw.Draw(self.image)

    def text(
        self, x: float, y: float, text: str, size: int, colour: str, *, bold: bool = False, anchor: str = "la"
    ) -> int:
        """One line, made drawable; returns where it ends."""
        text = plain(text)
        # The font has one weight; a thin stroke makes the second.
        stroke = size / 55 if bold else 0
        self._draw.text((x, y), text, fill=colour, font=font(size), anchor=anchor, stroke_width=stroke)
        return round(x + width(text, size))

    def lines(self, x: int, y: int, lines: Sequence[str], size: int, colour: str) -> int:
        """Lines under each other; returns where the next thing may begin."""
        for line in lines:
            self.text(x, y, line, size, colour)
            y += leading(size)
        return y

    def panel(self, rect: Rect, fill: str, *, radius: int = 0, outline: str | None = None, line: int = 2) -> None:
        """A filled rectangle with round corners; the outline lies inside of it."""
        if outline is not None:
            self.panel(rect, outline, radius=radius)
            rect, radius = (rect[0] + line, rect[1] + line, rect[2] - line, rect[3] - line), max(0, radius - line)
        size = (rect[2] - rect[0], rect[3] - rect[1])
        if min(size) > 0:
            self.image.paste(fill, rect, _rounded(size, min(radius, size[0] // 2, size[1] // 2)))

    def picture(self, picture: Image.Image, x: int, y: int, edge: str, radius: int = 8) -> None:
        """The picture with a hairline of the colour `edge` around it."""
        self.panel((x - 2, y - 2, x + picture.width + 2, y + picture.height + 2), edge, radius=radius + 2)
        self.image.paste(picture, (x, y), _rounded(picture.size, min(radius, *(side // 2 for side in picture.size))))

    def badge(self, x: int, y: int, side: int, colour: str, label: str) -> None:
        """A filled circle with a white edge and a label, `side` pixels wide."""
        self.panel((x, y, x + side, y + side), colour, radius=side // 2, outline="white")
        self.text(x + side / 2, y + side / 2, label, round(side * 0.62), "white", bold=True, anchor="mm")


def leading(size: int) -> int:
    """From one line of text to the next."""
    return round(size * 1.36)


@dataclass(frozen=True)
class Frame:
    """A box on a picture."""

    box: Box
    colour: str
    number: int | None = None  # drawn as a badge at its corner
    dashed: bool = False
    line: int = 4


def framed(picture: Image.Image, frames: Sequence[Frame]) -> Image.Image:
    """A copy with the frames on it, each with a white edge; frames that coincide are drawn inside each other."""
    sheet = Sheet(picture.size, "black")
    sheet.image.paste(picture)
    drawn: list[Rect] = []
    for frame in frames:
        rect = frame_rect(frame.box, picture.size)
        nested = sum(max(abs(a - b) for a, b in zip(rect, other, strict=True)) < frame.line for other in drawn)
        drawn.append(rect)
        inset = nested * (frame.line + 4)
        inner = (rect[0] + inset, rect[1] + inset, rect[2] - inset, rect[3] - inset)
        _draw_frame(sheet.image, inner if inner[0] < inner[2] and inner[1] < inner[3] else rect, frame)
    _draw_badges(sheet, frames, drawn)
    return sheet.image


def frame_rect(box: Box, size: Size) -> Rect:
    """The pixels of a box, inside the picture and never empty. NaN and what lies outside is brought to the edge."""
    x_min, y_min, x_max, y_max = (min(max(value, 0.0), 1.0) if value == value else 0.0 for value in box)
    left, top = min(round(x_min * size[0]), size[0] - 1), min(round(y_min * size[1]), size[1] - 1)
    return left, top, max(left + 1, round(x_max * size[0])), max(top + 1, round(y_max * size[1]))


def _draw_frame(image: Image.Image, rect: Rect, frame: Frame) -> None:
    # Grown outwards, so that the frame hides nothing of what it shows; inwards only at the edge of the picture.
    # A dashed one stays outside of a solid one around the same thing.
    grow = frame.line * 2 + 3 if frame.dashed else frame.line
    left, top = max(1, rect[0] - grow), max(1, rect[1] - grow)
    right, bottom = min(image.width - 1, rect[2] + grow) - 1, min(image.height - 1, rect[3] + grow) - 1
    if right - left < 2 or bottom - top < 2:
        left, top, right, bottom = rect[0], rect[1], max(rect[0], rect[2] - 1), max(rect[1], rect[3] - 1)
    draw = ImageDraw.Draw(image)
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline="white", width=min(frame.line + 2, 6))
    if not frame.dashed:
        draw.rectangle((left, top, right, bottom), outline=frame.colour, width=frame.line)
        return
    for x in range(left, right + 1, 16):
        for y in (top, bottom - frame.line + 1):
            draw.rectangle((x, y, min(x + 9, right), y + frame.line - 1), fill=frame.colour)
    for y in range(top, bottom + 1, 16):
        for x in (left, right - frame.line + 1):
            draw.rectangle((x, y, x + frame.line - 1, min(y + 9, bottom)), fill=frame.colour)


def _draw_badges(sheet: Sheet, frames: Sequence[Frame], rects: Sequence[Rect]) -> None:
    side = max(8, min(34, min(sheet.image.size) // 2))
    # Boxes without a number (the answer's, the truth's) are what one looks for: no badge on them.
    taken = [rect for frame, rect in zip(frames, rects, strict=True) if frame.number is None]
    for frame, rect in zip(frames, rects, strict=True):
        if frame.number is not None:
            x, y = _free_place(rect, side, sheet.image.size, taken)
            taken.append((x, y, x + side, y + side))
            sheet.badge(x, y, side, frame.colour, str(frame.number))


def _free_place(rect: Rect, side: int, size: Size, taken: Sequence[Rect]) -> tuple[int, int]:
    """A corner for a badge: outside of the box above it, else below it, else inside; beside badges already there."""
    slots = range(0, 6 * (side + 2), side + 2)
    places = [(rect[0] + slot, y) for y in (rect[1] - side - 4, rect[3] + 4, rect[1] + 6) for slot in slots]
    for x, y in places:
        inside = x >= 0 and y >= 0 and x + side <= size[0] and y + side <= size[1]
        if inside and not any(x < r[2] and r[0] < x + side and y < r[3] and r[1] < y + side for r in taken):
            return x, y
    return max(0, min(rect[0], size[0] - side)), max(0, min(rect[1], size[1] - side))


@lru_cache(maxsize=256)
def _has_glyph(character: str) -> bool:
    if character == "�" or ord(character) < 32 or 0xD800 <= ord(character) < 0xE000:
        return False
    return bytes(font(20).getmask(character)) != bytes(font(20).getmask("\uffff"))


@lru_cache(maxsize=16)
def _rounded(size: Size, radius: int) -> Image.Image:
    mask = Image.new("L", size, 255)
    if radius > 0:
        large = Image.new("L", (2 * radius * _SMOOTH, 2 * radius * _SMOOTH))
        ImageDraw.Draw(large).ellipse((0, 0, large.width - 1, large.height - 1), fill=255)
        disc = large.resize((2 * radius, 2 * radius), Image.Resampling.BOX)
        right, bottom = size[0] - radius, size[1] - radius
        for x, y, u, v in ((0, 0, 0, 0), (right, 0, 1, 0), (0, bottom, 0, 1), (right, bottom, 1, 1)):
            mask.paste(disc.crop((u * radius, v * radius, (u + 1) * radius, (v + 1) * radius)), (x, y))
    return mask
