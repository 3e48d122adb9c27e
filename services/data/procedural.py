"""Procedural parts: industrial-looking pictures with exact truth, made in milliseconds. Pure, but for `write_set`.

Texture categories need a crop (a defect and a benign smudge look the same from afar); layout categories need a normal
exemplar (nothing in one picture tells that an element is missing). The same arguments always give the same pixels.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from services.data import layouts, textures
from services.data.textures import SIZE

CATEGORIES = (*textures.TEXTURES, *layouts.LAYOUTS)
DEFECTS = {**dict.fromkeys(textures.TEXTURES, textures.MARKS), **layouts.LAYOUT_DEFECTS}
# Defects that a single picture cannot show, however close one looks.
COMPARISON_ONLY = frozenset(kind for kinds in layouts.LAYOUT_DEFECTS.values() for kind in kinds)

ANOMALOUS_SHARE = 0.5
SMUDGED_SHARE = 0.7  # of the normal textures; the rest are clean
_DUSTY_SHARE = 0.3  # of the layout units, whatever their label
TRAINING_VARIANTS = 1_000_000  # variants from here on are held out

Box = tuple[float, float, float, float]  # normalised x_min, y_min, x_max, y_max


@dataclass(frozen=True)
class PartDefect:
    type: str
    box: Box


@dataclass(frozen=True)
class Part:
    image: Image.Image  # RGB, SIZE x SIZE
    category: str
    variant: int
    seed: int
    defects: tuple[PartDefect, ...]
    benign: tuple[Box, ...]  # smudges that look suspicious from afar
    landmark: Box | None = None  # the one place that matters on every unit of the category


def make_part(category: str, seed: int, variant: int, defect: str | None, smudged: bool | None = None) -> Part:
    """One part. Units of one `variant` share a design and differ by `seed`; `smudged` None: by the usual share."""
    if category not in DEFECTS or (defect is not None and defect not in DEFECTS[category]):
        raise ValueError(f"there is no defect {defect!r} of category {category!r}")
    lot = np.random.default_rng([zlib.crc32(category.encode()), variant])
    unit = np.random.default_rng([zlib.crc32(category.encode()), variant, seed, 1])
    if category in textures.TEXTURES:
        smudged = unit.uniform() < SMUDGED_SHARE if smudged is None else smudged
        return _texture_part(category, seed, variant, defect, smudged, lot, unit)
    smudged = unit.uniform() < _DUSTY_SHARE if smudged is None else smudged
    return _layout_part(category, seed, variant, defect, smudged, lot, unit)


def make_set(
    categories: tuple[str, ...], per_category: int, first_seed: int, variants: range, units: int = 0
) -> Iterator[Part]:
    """`per_category` parts of each category, half of them anomalous, defect kinds in turn, variants in turn.

    `units` shifts the seed of every part: exemplars of the same variants are made with another one.
    """
    for category in categories:
        kinds = DEFECTS[category]
        for i in range(per_category):
            variant = variants[i % len(variants)]
            # The label must not follow the parity of the variant, so it is drawn, in pairs that stay balanced.
            first = np.random.default_rng([first_seed, zlib.crc32(category.encode()), i // 2]).uniform() < 0.5
            anomalous = first if i % 2 == 0 else not first
            defect = kinds[(i // 2) % len(kinds)] if anomalous else None
            yield make_part(category, first_seed + units + i, variant, defect)


def exemplar_seed(seed: int) -> int:
    """The seed of a normal unit to compare the unit of `seed` with: never the unit itself."""
    return seed + 2**31


def write_set(
    directory: Path,
    categories: tuple[str, ...] = CATEGORIES,
    per_category: int = 24,
    variants_per_category: int = 8,
    first_seed: int = TRAINING_VARIANTS,
) -> Path:
    """Writes an MVTec-like tree of held-out parts (`category/train/good`, `category/test/<type>`) and its manifest.

    Every variant has one exemplar in train/good. Returns the manifest's path.
    """
    rows = []
    variants = range(first_seed, first_seed + variants_per_category)
    for category in categories:
        exemplars = {}
        for variant in variants:
            path = f"{category}/train/good/{variant}.png"
            exemplars[variant] = path
            part = make_part(category, exemplar_seed(variant), variant, None, smudged=False)
            rows.append(_write(directory, path, part, "train", None))
        for part in make_set((category,), per_category, first_seed, variants):
            kind = part.defects[0].type if part.defects else "good"
            path = f"{category}/test/{kind}/{part.seed}.png"
            rows.append(_write(directory, path, part, "val", exemplars[part.variant]))
    manifest = directory / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest


def _write(directory: Path, path: str, part: Part, split: str, reference: str | None) -> dict[str, object]:
    target = directory / path
    target.parent.mkdir(parents=True, exist_ok=True)
    part.image.save(target)
    row: dict[str, object] = {
        "image": path,
        "split": split,
        "label": "anomalous" if part.defects else "normal",
        "category": part.category,
        "group": f"{part.category}-{part.variant}",
        "defects": [{"type": d.type, "box": [round(v * SIZE) for v in d.box]} for d in part.defects],
        "boxes_known": True,
    }
    return row if reference is None else {**row, "reference": reference}


def _texture_part(
    category: str, seed: int, variant: int, defect: str | None, smudged: bool,
    lot: np.random.Generator, unit: np.random.Generator,
) -> Part:  # fmt: skip
    grey = textures.texture(category, lot, unit)
    tint = lot.uniform(0.86, 1.0, 3).astype(np.float32)
    defects: tuple[PartDefect, ...] = ()
    benign: tuple[Box, ...] = ()
    if defect is not None or smudged:
        kind = defect or str(unit.choice(textures.MARKS))
        tile, extent = textures.mark(kind, unit, soft=defect is None)
        x, y = unit.uniform(20, SIZE - 20, 2)
        textures.put(grey, tile, x, y)
        half = extent / 2 + (2.0 if defect else 3.0)
        box = _normalised((x - half, y - half, x + half, y + half))
        defects, benign = ((PartDefect(defect, box),), ()) if defect else ((), (box,))
    pixels = cv2.convertScaleAbs(grey[:, :, None] * (tint * np.float32(unit.uniform(0.94, 1.06))))
    return Part(Image.fromarray(pixels), category, variant, seed, defects, benign)


def _layout_part(
    category: str, seed: int, variant: int, defect: str | None, smudged: bool,
    lot: np.random.Generator, unit: np.random.Generator,
) -> Part:  # fmt: skip
    layout = layouts.make_layout(category, lot)
    # From generators of their own: the camera must not move differently over a spoiled unit.
    camera = np.random.default_rng([variant, seed, 2])
    bounds = None
    if defect is not None:
        layout, bounds = layouts.spoil(layout, defect, unit)
    matrix = cv2.getRotationMatrix2D((SIZE / 2, SIZE / 2), camera.uniform(-2, 2), 1.0)
    matrix[:, 2] += camera.uniform(-5, 5, 2)
    moved = cv2.warpAffine(
        layouts.draw(layout), matrix, (SIZE, SIZE), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    ).astype(np.float32)
    moved *= np.float32(camera.uniform(0.93, 1.07))
    moved += (textures.noise(camera) * np.float32(3))[:, :, None]
    benign: tuple[Box, ...] = ()
    if smudged:
        tile, extent = textures.mark(str(camera.choice(textures.MARKS)), camera, soft=True)
        x, y = camera.uniform(20, SIZE - 20, 2)
        dust = np.zeros((SIZE, SIZE), np.float32)
        textures.put(dust, tile, x, y)
        moved += dust[:, :, None]
        half = extent / 2 + 3.5
        benign = (_normalised((x - half, y - half, x + half, y + half)),)
    pixels = cv2.convertScaleAbs(np.maximum(moved, 0, out=moved))
    defects = () if defect is None or bounds is None else (PartDefect(defect, _moved(bounds, matrix)),)
    landmark = _moved(layout.elements[0].bounds, matrix) if category == "stamped_plate" else None
    return Part(Image.fromarray(pixels), category, variant, seed, defects, benign, landmark)


def _moved(bounds: layouts.Bounds, matrix: "np.ndarray[tuple[int, int], np.dtype[np.float64]]") -> Box:
    x1, y1, x2, y2 = bounds
    corners = np.array([[x1, y1, 1], [x2, y1, 1], [x1, y2, 1], [x2, y2, 1]]) @ matrix.T
    (left, top), (right, bottom) = corners.min(0), corners.max(0)
    return _normalised((left - 1, top - 1, right + 1, bottom + 1))


def _normalised(bounds: layouts.Bounds) -> Box:
    x1, y1, x2, y2 = (min(max(value / SIZE, 0.0), 1.0) for value in bounds)
    return (x1, y1, x2, y2)
