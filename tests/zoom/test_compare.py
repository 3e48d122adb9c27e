"""What a comparison shows."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from services.zoom.compare import View, compare, composite
from services.zoom.crop import WHOLE, ToolError, crop
from services.zoom.registration import register
from tests.zoom.parts import make_board, make_motion, moved, pads

SIDE = 384
BOX = (0.3, 0.4, 0.5, 0.6)


def blue(image: Image.Image) -> np.ndarray:
    return np.asarray(image)[:, :, 2].astype(int)


@pytest.mark.parametrize("box", [None, BOX])
def test_equal_images_differ_nowhere(box: tuple[float, ...] | None) -> None:
    board = make_board()
    shown = compare(board, board, box, View.COMPOSITE)
    assert shown.registration.confidence > 0.99
    assert blue(shown.image).max() == 0
    red, green = (np.asarray(shown.image)[:, :, channel] for channel in (0, 1))
    assert np.array_equal(red, green)


@pytest.mark.parametrize("missing", range(0, 24, 5))
@pytest.mark.parametrize(("angle", "shift"), [(0.0, (0.0, 0.0)), (3.0, (6.0, -4.0))])
def test_a_missing_pad_is_where_the_difference_is(missing: int, angle: float, shift: tuple[float, float]) -> None:
    motion = make_motion(SIDE, angle, 1.0, shift)
    x, y = motion @ [*pads(0, SIDE)[missing], 1.0]
    shown = compare(moved(make_board(missing=missing), motion, noise=2), make_board(), None, View.COMPOSITE)
    difference = blue(shown.image)
    at_pad = difference[round(y) - 3 : round(y) + 4, round(x) - 3 : round(x) + 4]
    assert at_pad.min() > 60
    # Elsewhere only edges differ a little, by interpolation.
    assert np.median(difference) < 8
    row, column = np.unravel_index(np.argmax(Image.fromarray(difference.astype(np.uint8)).reduce(8)), (48, 48))
    assert np.hypot(column * 8 + 4 - x, row * 8 + 4 - y) < 16


def test_a_one_pixel_scratch_on_a_large_part_survives() -> None:
    exemplar = make_board(side=3000)
    part = exemplar.copy()
    ImageDraw.Draw(part).line([(900, 700), (1700, 1500)], (20, 20, 20), 1)
    shown = compare(part, exemplar, None, View.COMPOSITE)
    assert shown.image.width * shown.image.height <= 1280 * 28 * 28
    difference = blue(shown.image)
    scale = shown.image.width / 3000
    along = [difference[round(y * scale) - 1 : round(y * scale) + 2, round(x * scale) - 1 : round(x * scale) + 2].max()
             for x, y in zip(range(920, 1680, 20), range(720, 1480, 20), strict=True)]  # fmt: skip
    assert min(along) >= 10


def test_a_change_of_colour_alone_shows() -> None:
    exemplar = make_board()
    part = exemplar.copy()
    # (96, 120, 88) → the same grey in another hue.
    ImageDraw.Draw(part).rectangle([100, 100, 130, 130], (120, 105, 101))
    difference = blue(compare(part, exemplar, None, View.COMPOSITE).image)
    assert difference[115, 115] >= 20


def test_another_light_is_no_difference() -> None:
    part = moved(make_board(missing=5), make_motion(SIDE), gain=0.7, offset=15)
    shown = compare(part, make_board(), None, View.COMPOSITE)
    difference = blue(shown.image)
    x, y = pads(0, SIDE)[5]
    assert np.median(difference) <= 4
    assert difference[y, x] > 50
    assert np.asarray(shown.image)[0, 0, 1] == np.asarray(make_board().convert("L"))[0, 0]  # G is the exemplar as it is


@pytest.mark.parametrize("view", list(View))
def test_a_comparison_shows_the_region_of_the_crop(view: View) -> None:
    board = make_board(side=800)
    cropped, region = crop(board, BOX)
    shown = compare(board, board, BOX, view)
    assert shown.region == region
    assert shown.image.size == cropped.size
    if view is View.SIDE_BY_SIDE:
        assert np.array_equal(np.asarray(shown.image), np.asarray(cropped))


def test_a_region_of_the_composite_is_cut_from_the_whole_one() -> None:
    part = moved(make_board(missing=2, side=800), make_motion(800, 2.0, 1.02, (5.0, 9.0)))
    registration = register(part, make_board(side=800))
    whole = composite(part, make_board(side=800), registration, None)
    region = composite(part, make_board(side=800), registration, BOX)
    expected, _ = crop(whole, BOX)
    # OpenCV places pixels to 1/32, which shows at edges.
    assert np.abs(np.asarray(region).astype(int) - np.asarray(expected)).max() <= 8


def test_the_side_by_side_view_is_the_exemplar_in_the_parts_place() -> None:
    motion = make_motion(SIDE, 5.0, 1.0, (10.0, -6.0))
    part = moved(make_board(), motion)
    cropped, _ = crop(part, BOX)
    shown = compare(part, make_board(), BOX, View.SIDE_BY_SIDE)
    assert np.abs(np.asarray(shown.image).astype(int) - np.asarray(cropped)).mean() < 5


def test_where_the_exemplar_has_no_pixels_nothing_differs() -> None:
    part = moved(make_board(), make_motion(SIDE, shift=(40.0, 0.0)))
    shown = np.asarray(compare(part, make_board(), None, View.COMPOSITE).image)
    strip = shown[:, :38]  # moved in from beyond the exemplar's left edge
    assert strip[:, :, 2].max() == 0
    assert np.array_equal(strip[:, :, 0], strip[:, :, 1])


@pytest.mark.parametrize("view", list(View))
def test_below_the_confidence_the_exemplar_is_shown_whole(view: View) -> None:
    exemplar = make_board(1)
    shown = compare(make_board(0), exemplar, BOX, view)
    assert not shown.registration.registered
    assert shown.region == WHOLE
    assert np.array_equal(np.asarray(shown.image), np.asarray(exemplar))


def test_a_wrong_box_is_told_whether_registered_or_not() -> None:
    for exemplar in (make_board(0), make_board(1)):
        with pytest.raises(ToolError):
            compare(make_board(0), exemplar, (0.5, 0.5, 0.4, 0.6), View.COMPOSITE)
