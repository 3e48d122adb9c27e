"""Geometry of crops: padding, bounds, output size."""

import math

import numpy as np
import pytest
from PIL import Image

from services.zoom.crop import DEFAULTS, CropParameters, ToolError, crop, cut_of, fit, output_size


def make_gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a pixel tells where it came from."""
    x = np.linspace(0, 255, width)[None, :].repeat(height, 0)
    y = np.linspace(0, 255, height)[:, None].repeat(width, 1)
    return Image.fromarray(np.dstack([x, y, np.zeros_like(x)]).astype(np.uint8))


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0.4, 0.4, 0.6, 0.6), (300, 150, 700, 350)),  # 0.1 of each side is added
        ((0.0, 0.0, 0.2, 0.2), (0, 0, 300, 150)),  # clamped at the left and the top
        ((0.95, 0.95, 1.0, 1.0), (850, 425, 1000, 500)),  # and at the right and the bottom
        ((0.0, 0.0, 1.0, 1.0), (0, 0, 1000, 500)),
        ((0.5, 0.5, 0.5004, 0.5004), (400, 200, 601, 301)),  # outwards to whole pixels
    ],
)
def test_a_box_is_padded_and_clamped(box: tuple[float, ...], pixels: tuple[int, ...]) -> None:
    cut = cut_of((1000, 500), box)
    assert cut.pixels == pixels
    assert cut.region == (pixels[0] / 1000, pixels[1] / 500, pixels[2] / 1000, pixels[3] / 500)


@pytest.mark.parametrize("seed", range(20))
def test_the_region_always_holds_the_box_and_stays_in_the_image(seed: int) -> None:
    rng = np.random.default_rng(seed)
    size = tuple(int(v) for v in rng.integers(300, 5000, 2))
    (x_min, x_max), (y_min, y_max) = np.sort(rng.uniform(0, 1, (2, 2)), axis=1)
    box = tuple(float(np.float32(v)) for v in (x_min, y_min, x_max, y_max))
    left, top, right, bottom = cut_of((size[0], size[1]), box).region
    assert 0 <= left <= box[0] < box[2] <= right <= 1
    assert 0 <= top <= box[1] < box[3] <= bottom <= 1


def test_a_float32_box_cuts_the_same_pixels_as_its_decimal() -> None:
    for tenth in range(1, 10):
        exact = (tenth / 10 - 0.05, 0.25, tenth / 10, 0.75)
        assert cut_of((4000, 3000), [float(np.float32(v)) for v in exact]) == cut_of((4000, 3000), exact)


def test_the_crop_shows_its_region() -> None:
    image = make_gradient(1000, 500)
    shown, region = crop(image, (0.4, 0.4, 0.6, 0.6))
    pixels = np.asarray(shown).astype(float) / 255
    assert np.allclose(pixels[0, 0, :2], region[:2], atol=0.01)
    assert np.allclose(pixels[-1, -1, :2], region[2:], atol=0.01)


@pytest.mark.parametrize(
    "size", [(28, 28), (100, 224), (30, 900), (224, 224), (500, 400), (4000, 3000), (20000, 40), (1, 5), (7, 32768)]
)
def test_the_output_is_bounded_and_keeps_the_aspect(size: tuple[int, int]) -> None:
    width, height = output_size(size)
    assert width * height <= DEFAULTS.max_output_pixels
    # Whole pixels: at most one is lost on each side.
    scale = max(width / size[0], height / size[1])
    assert abs(width - size[0] * scale) <= 1.01
    assert abs(height - size[1] * scale) <= 1.01
    within_budget = math.prod(size) * (DEFAULTS.min_output_px / min(size)) ** 2 <= DEFAULTS.max_output_pixels
    if within_budget:
        assert min(width, height) >= DEFAULTS.min_output_px


def test_small_crops_are_up_sampled_and_others_left_alone() -> None:
    assert output_size((56, 112)) == (224, 448)
    assert output_size((300, 400)) == (300, 400)
    image = make_gradient(300, 400)
    assert fit(image) is image


def test_a_thin_line_survives_shrinking() -> None:
    image = Image.new("L", (4000, 4000))
    image.paste(255, (1999, 0, 2000, 4000))
    shrunk = np.asarray(fit(image))
    assert shrunk.max(axis=1).min() >= 40  # one column of four source pixels holds the line


def test_a_region_that_is_too_small_is_told_to_the_policy() -> None:
    with pytest.raises(ToolError, match="larger bbox_2d"):
        crop(make_gradient(100, 100), (0.5, 0.5, 0.52, 0.52))
    shown, _ = crop(make_gradient(100, 100), (0.45, 0.45, 0.55, 0.55))
    assert shown.size == (224, 224)


def test_other_parameters_are_obeyed() -> None:
    parameters = CropParameters(padding=0.0, min_region_px=10, min_output_px=50, max_output_pixels=50 * 50)
    shown, region = crop(make_gradient(100, 100), (0.5, 0.5, 0.6, 0.6), parameters)
    assert shown.size == (50, 50)
    assert region == (0.5, 0.5, 0.6, 0.6)
