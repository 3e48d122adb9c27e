"""Procedural texture materials and the marks on them. Grey float images; pure.

A benign smudge is a blurred drawing. A defect is such a smudge with the drawing's fine detail on top, which a 4-fold
shrink takes away: the first view (96 px) shows the same smudge, of the same total darkness; only a crop tells.
"""

from functools import lru_cache

import cv2
import numpy as np
import numpy.typing as npt

SIZE = 384  # pixels a side of every part

Grey = npt.NDArray[np.float32]

TEXTURES = ("brushed_metal", "woven", "dotted_board")
MARKS = ("scratch", "dent", "spots")

_TILE = 48  # a mark is drawn on a tile of this size: its largest extent of 24 px plus room for the blur
_DETAIL = 2.2  # gain of a defect's fine detail
_OVERSAMPLING = 4  # drawn larger and shrunk, so that thin lines have soft, sub-pixel edges


def noise(rng: np.random.Generator) -> Grey:
    """Normal noise [SIZE, SIZE]: a window of a larger field, which takes a tenth of the time of fresh noise."""
    field = _noise_field()
    y, x = (int(value) for value in rng.integers(0, len(field) - SIZE, 2))
    return field[y : y + SIZE, x : x + SIZE]


@lru_cache(maxsize=1)
def _noise_field() -> Grey:
    return np.random.default_rng(0).standard_normal((4 * SIZE, 4 * SIZE), dtype=np.float32)


def texture(name: str, lot: np.random.Generator, unit: np.random.Generator) -> Grey:
    """A clean surface [SIZE, SIZE], about 0 to 255. `lot` draws what units of a variant share, `unit` the rest."""
    level = lot.uniform(135, 175)
    if name == "brushed_metal":
        streaks = cv2.blur(noise(unit), (int(lot.integers(25, 61)), 1)) * lot.uniform(28, 40)
        return _clip(level + streaks + noise(unit) * 3)
    if name == "woven":
        pitch, phase = lot.uniform(6.5, 9.5), unit.uniform(0, 2 * np.pi, 2)
        wave = np.sin(np.arange(SIZE, dtype=np.float32) * np.float32(2 * np.pi / pitch))
        across = np.roll(wave, int(phase[0] * 10))[None, :]
        down = np.roll(wave, int(phase[1] * 10))[:, None]
        return _clip(level + lot.uniform(7, 11) * (across * down + 0.5 * across) + noise(unit) * 4)
    if name == "dotted_board":
        return _clip(_dots(level, lot, unit) + noise(unit) * 4)
    raise ValueError(f"unknown texture {name!r}")


def mark(kind: str, rng: np.random.Generator, soft: bool) -> tuple[Grey, float]:
    """Darkness to subtract [_TILE, _TILE] and the mark's extent in pixels (13 to 24). `soft`: a benign smudge."""
    extent = rng.uniform(13, 24)
    drawn = cv2.resize(_draw(kind, extent, rng), (_TILE, _TILE), interpolation=cv2.INTER_AREA)
    drawn = cv2.GaussianBlur(drawn, (0, 0), 0.45)  # the lens
    smudge = cv2.GaussianBlur(drawn, (0, 0), rng.uniform(2.0, 2.8))
    scale = np.float32(rng.uniform(6500, 8500) / drawn.sum())
    # The detail sums to zero and lies above what a 4-fold shrink lets through (AUROC of the best local statistic of the
    # first view 0.68, of the crop 0.99).
    detail = 0.0 if soft else _DETAIL * (drawn - cv2.GaussianBlur(drawn, (0, 0), 1.0))
    return ((smudge + detail) * scale).astype(np.float32), extent


def put(image: Grey, tile: Grey, x: float, y: float) -> None:
    """Subtracts a mark's tile, centred on (x, y) in pixels, in place."""
    left, top = round(x) - _TILE // 2, round(y) - _TILE // 2
    x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + _TILE, SIZE), min(top + _TILE, SIZE)
    image[y0:y1, x0:x1] -= tile[y0 - top : y1 - top, x0 - left : x1 - left]


def _draw(kind: str, extent: float, rng: np.random.Generator) -> Grey:
    side, scale = _TILE * _OVERSAMPLING, _OVERSAMPLING
    canvas = np.zeros((side, side), np.uint8)
    centre, radius = side / 2, extent * scale / 2
    if kind == "scratch":
        angle, bend = rng.uniform(0, np.pi), rng.uniform(-0.35, 0.35)
        steps = np.linspace(-1, 1, 9)[:, None] * radius
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        points = centre + steps * along + (steps / radius) ** 2 * radius * bend * across
        cv2.polylines(canvas, [points.round().astype(np.int32)], False, 255, int(1.7 * scale))
    elif kind == "dent":
        axes = (round(radius * rng.uniform(0.75, 1)), round(radius * rng.uniform(0.75, 1)))
        cv2.ellipse(canvas, (side // 2, side // 2), axes, rng.uniform(0, 180), 0, 360, 255, int(1.6 * scale))
    elif kind == "spots":
        for _ in range(int(rng.integers(5, 9))):
            angle, distance = rng.uniform(0, 2 * np.pi), radius * np.sqrt(rng.uniform(0, 1))
            x, y = centre + distance * np.cos(angle), centre + distance * np.sin(angle)
            cv2.circle(canvas, (round(x), round(y)), round(rng.uniform(1.1, 1.6) * scale), 255, -1)
    else:
        raise ValueError(f"unknown mark {kind!r}")
    return canvas.astype(np.float32)


def _dots(level: float, lot: np.random.Generator, unit: np.random.Generator) -> Grey:
    pitch, depth = int(lot.integers(14, 21)), lot.uniform(16, 26)
    cell = np.zeros((pitch, pitch), np.uint8)
    cv2.circle(cell, (pitch // 2, pitch // 2), pitch // 4, 255, -1, cv2.LINE_AA)
    repeats = SIZE // pitch + 2
    dots = np.tile(cell.astype(np.float32) / 255, (repeats, repeats))
    dy, dx = unit.integers(0, pitch, 2)
    return np.asarray(level + depth * dots[dy : dy + SIZE, dx : dx + SIZE], np.float32)


def _clip(image: Grey) -> Grey:
    return np.clip(image, 40, 235).astype(np.float32)
