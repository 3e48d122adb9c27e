"""Registrations recover motions that are known, and say so when there is nothing to recover."""

import json
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from services.zoom.registration import DEFAULTS, register
from tests.zoom.parts import DATA, make_board, make_motion, misplaced, moved

SIDE = 384
MOTIONS = [
    # angle in degrees, scale, shift in pixels
    (0.0, 1.0, (0.0, 0.0)),
    (0.0, 1.0, (5.0, -3.0)),
    (0.0, 1.0, (30.0, 25.0)),
    (1.0, 1.0, (0.0, 0.0)),
    (-4.0, 1.0, (6.0, 2.0)),
    (10.0, 1.0, (0.0, 0.0)),
    (0.0, 1.05, (0.0, 0.0)),
    (3.0, 0.95, (-8.0, 8.0)),
    (-8.0, 1.08, (12.0, -10.0)),
]


@pytest.mark.parametrize(("angle", "scale", "shift"), MOTIONS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_known_motion_is_recovered(seed: int, angle: float, scale: float, shift: tuple[float, float]) -> None:
    motion = make_motion(SIDE, angle, scale, shift)
    # A pad is missing, the light is another and the sensor noisy.
    part = moved(make_board(seed, missing=5), motion, gain=0.85, offset=12, noise=4)
    found = register(part, make_board(seed))
    assert found.registered
    assert misplaced(found.matrix, motion, SIDE) < 1.0


@pytest.mark.parametrize("shift", [(0.0, 0.0), (7.0, -4.0)])
def test_whole_pixel_shifts_are_exact(shift: tuple[float, float]) -> None:
    found = register(moved(make_board(), make_motion(SIDE, shift=shift)), make_board())
    assert np.array_equal(found.matrix, [[1, 0, -shift[0]], [0, 1, -shift[1]]])


def test_sizes_may_differ() -> None:
    exemplar = make_board(side=512)
    part = exemplar.resize((300, 300), Image.Resampling.BOX)
    found = register(part, exemplar)
    assert found.registered
    corners = np.array([[0, 0, 1], [299, 0, 1], [0, 299, 1], [299, 299, 1]]) @ found.matrix.T
    assert np.abs(corners - np.array([[0, 0], [511, 0], [0, 511], [511, 511]])).max() < 2.0


@pytest.mark.parametrize(("gain", "offset"), [(1.0, 0.0), (0.6, 0.0), (1.3, -60.0), (0.8, 30.0)])
def test_the_light_is_told_apart_from_the_part(gain: float, offset: float) -> None:
    found = register(moved(make_board(missing=3), make_motion(SIDE), gain, offset), make_board())
    assert found.gain == pytest.approx(gain, abs=0.06)
    assert found.offset == pytest.approx(offset, abs=8)


def make_noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ("part", "exemplar"),
    [
        (make_board(0), make_board(1)),
        (make_noise(0), make_noise(1)),
        (make_board(0), make_noise(0)),
        (make_board(0), Image.new("RGB", (SIDE, SIDE), (90, 90, 90))),
        (Image.new("RGB", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE))),
        (Image.new("RGB", (8, 8)), make_board(0)),
        (Image.new("RGB", (20000, 30), (9, 9, 9)), make_board(0)),
    ],
)
def test_what_has_nothing_in_common_is_not_registered(part: Image.Image, exemplar: Image.Image) -> None:
    found = register(part, exemplar)
    assert not found.registered
    assert 0.0 <= found.confidence < DEFAULTS.min_confidence
    assert np.isfinite(found.matrix).all()


def test_it_is_deterministic() -> None:
    part = moved(make_board(missing=1), make_motion(SIDE, 6.0, 1.03, (9.0, 4.0)))
    first, second = register(part, make_board()), register(part, make_board())
    assert np.array_equal(first.matrix, second.matrix)
    assert first.confidence == second.confidence


def rows(name: str) -> list[dict[str, str]]:
    manifest = DATA / name / "manifest.jsonl"
    if not manifest.exists():
        pytest.skip(f"{manifest} is absent: the real images are not part of the repository")
    return [row for row in map(json.loads, manifest.read_text().splitlines()) if row["split"] == "train"]


def opened(name: str, path: str) -> Image.Image:
    with Image.open(DATA / name / path) as image:
        return image.convert("RGB")


def test_real_boards_register_to_their_own_template_only() -> None:
    defective = [row for row in rows("deeppcb") if row["label"] == "anomalous"][:200:10]
    motion = make_motion(640, 2.0, 1.01, (8.0, -6.0))
    for row, other in pairwise(defective):
        part = moved(opened("deeppcb", row["image"]), motion, gain=0.9, noise=3)
        template = opened("deeppcb", row["reference"])
        assert register(part, template).registered, row["image"]
        if row["group"] != other["group"]:
            assert not register(part, opened("deeppcb", other["reference"])).registered, row["image"]


def test_photographs_of_different_tiles_are_not_registered() -> None:
    normal = [row for row in rows("magnetic_tile") if row["label"] == "normal"]
    by_group = list({row["group"]: row for row in normal}.values())[:60:2]
    registered = [
        register(opened("magnetic_tile", a["image"]), opened("magnetic_tile", b["image"])).registered
        for a, b in pairwise(by_group)
    ]
    assert sum(registered) <= 1  # some tiles are in the set under two groups
