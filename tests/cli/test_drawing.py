"""Text that always fits, frames at the pixels they name."""

import math

import pytest
from PIL import Image

from services.cli import drawing
from services.cli.drawing import Box, Frame


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "two words",
        "W" * 5_000,
        "many words " * 500,
        "日本語 " * 50,
        "a\x00b\n\tc",
        "\ud800\u202e\ufffd",
        "é × – ß",
    ],
)
@pytest.mark.parametrize("room", [10, 90, 600])
def test_wrapped_lines_fit_their_room(text: str, room: int) -> None:
    lines = drawing.wrap(text, 20, room, 3)
    assert len(lines) <= 3
    # A single letter is not broken any further.
    assert all(drawing.width(line, 20) <= room or len(line) <= 2 for line in lines)
    assert all(line.isprintable() for line in lines)


def test_wrap_keeps_all_words_where_they_fit() -> None:
    words = "a dark line with sharp edges near the rim"
    assert " ".join(drawing.wrap(words, 20, 120, 9)) == words
    assert drawing.wrap(words, 20, 120, 2)[-1].endswith("…")


def test_characters_that_the_font_lacks() -> None:
    assert drawing.plain("384 × 384 – naïve\nß") == "384 x 384 - naive ss"
    assert drawing.plain("日") == "?"


@pytest.mark.parametrize(
    ("size", "room"), [((1, 1), (500, 400)), ((20_000, 10), (500, 400)), ((10, 20_000), (500, 400))]
)
def test_contained_keeps_inside_and_above_nothing(size: tuple[int, int], room: tuple[int, int]) -> None:
    width, height = drawing.contained(size, room)
    assert 1 <= width <= room[0]
    assert 1 <= height <= room[1]


def test_a_frame_surrounds_its_box_and_hides_nothing_of_it() -> None:
    picture = drawing.framed(Image.new("RGB", (400, 200), "black"), [Frame((0.25, 0.25, 0.5, 0.75), "#2563EB")])
    blue = (0x25, 0x63, 0xEB)
    for x, y in ((98, 100), (201, 100), (150, 48), (150, 151)):
        assert picture.getpixel((x, y)) == blue, (x, y)
    assert picture.crop((102, 52, 198, 148)).getcolors() == [(96 * 96, (0, 0, 0))]
    assert picture.crop((210, 0, 400, 200)).getcolors() == [(190 * 200, (0, 0, 0))]


def test_a_dashed_frame_has_gaps() -> None:
    picture = drawing.framed(
        Image.new("RGB", (400, 400), "#808080"), [Frame((0.2, 0.2, 0.8, 0.8), "#111827", dashed=True)]
    )
    top = [picture.getpixel((x, 71)) for x in range(80, 320)]
    assert {(0x11, 0x18, 0x27), (255, 255, 255)} == set(top)


def test_frames_that_coincide_are_both_seen() -> None:
    box = (0.2, 0.2, 0.8, 0.8)
    picture = drawing.framed(Image.new("RGB", (400, 400)), [Frame(box, "#FF0000"), Frame(box, "#0000FF")])
    middle = {picture.getpixel((x, 200)) for x in range(400)}
    assert {(255, 0, 0), (0, 0, 255)} <= middle


@pytest.mark.parametrize(
    "box",
    [
        (0, 0, 1, 1),
        (0.5, 0.5, 0.5, 0.5),
        (0.9, 0.9, 0.1, 0.1),
        (-3, -3, 9, 9),
        (math.nan,) * 4,
        (math.inf,) * 4,
        (1, 1, 1, 1),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (3, 500), (500, 3), (60, 60)])
def test_hostile_frames(box: Box, size: tuple[int, int]) -> None:
    left, top, right, bottom = drawing.frame_rect(box, size)
    assert 0 <= left < right <= size[0]
    assert 0 <= top < bottom <= size[1]
    frames = [Frame(box, "#FF0000", number) for number in (1, 2, 88)] + [Frame(box, "#00FF00", dashed=True)]
    assert drawing.framed(Image.new("RGB", size), frames).size == size
