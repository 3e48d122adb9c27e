"""Reads data sets on disk into samples: a manifest, an MVTec layout, or plain folders of pictures.

Raises BadDataError with the file and the line or folder that cannot be read; pixels are opened only where sizes or
masks ask for it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
Split = Literal["train", "val"]

MANIFEST = "manifest.jsonl"
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
_GOOD = "good"
# Parts of a mask this small (pixels) are specks of its drawing, no defects.
_SPECK = 4


class BadDataError(ValueError):
    """The data set is not what its layout promises."""


@dataclass(frozen=True)
class Defect:
    type: str
    box: Box  # normalised to the sample


@dataclass(frozen=True)
class Sample:
    """One picture with its truth. Boxes are empty where the set does not give them (`boxes_known` False)."""

    image: Path
    category: str
    anomalous: bool
    defects: tuple[Defect, ...] = ()
    boxes_known: bool = True
    split: Split = "train"
    group: str = ""  # near-duplicates share one; never split it
    reference: Path | None = None  # a normal picture to compare with
    crop: tuple[int, int, int, int] | None = None  # pixels of `image` (and of `reference`) that are the sample

    def open(self) -> Image.Image:
        return _opened(self.image, self.crop)

    def open_reference(self) -> Image.Image | None:
        return None if self.reference is None else _opened(self.reference, self.crop)


def read(path: Path) -> list[Sample]:
    """The data set at `path`: a manifest file, or a folder with one, or an MVTec layout, or plain folders."""
    if path.is_file():
        return read_manifest(path)
    if not path.is_dir():
        raise BadDataError(f"{path} is neither a manifest nor a folder")
    if (path / MANIFEST).exists():
        return read_manifest(path / MANIFEST)
    if (path / "train" / _GOOD).is_dir() or any(path.glob(f"*/train/{_GOOD}")):
        return read_mvtec(path)
    return read_folder(path)


def read_manifest(path: Path) -> list[Sample]:
    """JSON lines: paths relative to the manifest, boxes in pixels of the sample."""
    samples = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    samples.append(_manifest_sample(path.parent, json.loads(line)))
                except (KeyError, TypeError, ValueError, OSError) as error:
                    raise BadDataError(f"{path}, line {number}: {error!r}") from error
    return samples


def read_mvtec(path: Path) -> list[Sample]:
    """`category/train/good`, `category/test/<type>`, `category/ground_truth/<type>/<name>_mask.png`; or one category.

    Each separate blot of a mask is a defect with a box. MVTec pairs no picture with a normal one: no references.
    """
    categories = [path] if (path / "train").is_dir() else sorted(p for p in path.iterdir() if (p / "train").is_dir())
    samples = []
    for category in categories:
        for picture in _pictures(category / "train" / _GOOD):
            samples.append(Sample(picture, category.name, False, group=picture.stem))
        for folder in sorted(p for p in (category / "test").glob("*") if p.is_dir()):
            samples += [_mvtec_sample(category, folder.name, picture) for picture in _pictures(folder)]
    if not samples:
        raise BadDataError(f"{path} holds no pictures in an MVTec layout")
    return samples


def read_folder(path: Path) -> list[Sample]:
    """A category a sub-folder (or the folder itself); pictures in a folder `good` are normal, others of a named type.

    `category/good/1.png`, `category/scratch/2.png`. No boxes are known.
    """
    samples = []
    for picture in sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURES):
        folders = picture.relative_to(path).parts[:-1]
        if not folders:
            raise BadDataError(f"{picture} lies in no folder that says what it is (good, or a type of defect)")
        category = folders[-2] if len(folders) > 1 else path.resolve().name
        kind = folders[-1]
        defects = () if kind == _GOOD else (Defect(kind, (0.0, 0.0, 1.0, 1.0)),)
        samples.append(Sample(picture, category, bool(defects), defects, boxes_known=not defects))
    if not samples:
        raise BadDataError(f"{path} holds no pictures")
    return samples


def boxes_of_mask(mask: Image.Image) -> list[Box]:
    """A box, normalised, around each separate blot of what is not black."""
    filled = (np.asarray(mask.convert("L")) > 0).astype(np.uint8)
    _, _, stats, _ = cv2.connectedComponentsWithStats(filled, connectivity=8)
    height, width = filled.shape
    return [
        (x / width, y / height, (x + w) / width, (y + h) / height)
        for x, y, w, h, area in (tuple(int(v) for v in row) for row in stats[1:])
        if area > _SPECK
    ]


def _manifest_sample(root: Path, row: dict[str, Any]) -> Sample:
    if row["label"] not in ("normal", "anomalous"):
        raise ValueError(f"label {row['label']!r} is neither normal nor anomalous")
    if row.get("split", "train") not in ("train", "val"):
        raise ValueError(f"split {row['split']!r} is neither train nor val")
    image = _inside(root, row["image"])
    crop = None if row.get("crop") is None else _pixel_box(row["crop"])
    defects: tuple[Defect, ...] = ()
    if row.get("defects"):
        width, height = _size(image) if crop is None else (crop[2] - crop[0], crop[3] - crop[1])
        defects = tuple(Defect(d["type"], _normalised(_pixel_box(d["box"]), width, height)) for d in row["defects"])
    return Sample(
        image=image,
        category=row["category"],
        anomalous=row["label"] == "anomalous",
        defects=defects,
        # Anomalous and no word of where: not a normal sample.
        boxes_known=bool(row.get("boxes_known", True)) and (row["label"] == "normal" or bool(defects)),
        split=row.get("split", "train"),
        group=row.get("group", ""),
        reference=None if row.get("reference") is None else _inside(root, row["reference"]),
        crop=crop,
    )


def _mvtec_sample(category: Path, kind: str, picture: Path) -> Sample:
    if kind == _GOOD:
        return Sample(picture, category.name, False, split="val", group=picture.stem)
    mask = category / "ground_truth" / kind / f"{picture.stem}_mask.png"
    boxes: list[Box] = []
    if mask.exists():
        with Image.open(mask) as opened:
            boxes = boxes_of_mask(opened)
    defects = tuple(Defect(kind, box) for box in boxes) or (Defect(kind, (0.0, 0.0, 1.0, 1.0)),)
    return Sample(picture, category.name, True, defects, bool(boxes), "val", f"{kind}-{picture.stem}")


def _opened(path: Path, crop: tuple[int, int, int, int] | None) -> Image.Image:
    with Image.open(path) as opened:
        return (opened if crop is None else opened.crop(crop)).convert("RGB")


def _pictures(folder: Path) -> Iterator[Path]:
    yield from sorted(p for p in folder.glob("*") if p.suffix.lower() in _PICTURES)


def _size(path: Path) -> tuple[int, int]:
    with Image.open(path) as opened:
        return opened.size


def _inside(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{name!r} leads out of the data set")
    return path


def _pixel_box(values: Any) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = (int(value) for value in values)
    if not (x1 < x2 and y1 < y2):
        raise ValueError(f"box {values} is empty or reversed")
    return (x1, y1, x2, y2)


def _normalised(box: tuple[int, int, int, int], width: int, height: int) -> Box:
    x1, y1, x2, y2 = box
    clipped = (max(x1, 0) / width, max(y1, 0) / height, min(x2, width) / width, min(y2, height) / height)
    if clipped[0] >= clipped[2] or clipped[1] >= clipped[3]:
        raise ValueError(f"box {box} lies outside the picture")
    return clipped
