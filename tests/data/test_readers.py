"""Readers, on small sets made here, and on /work/shared/data where it is."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.data.procedural import write_set
from services.data.readers import BadDataError, boxes_of_mask, read

SHARED = Path("/work/shared/data")


def make_picture(path: Path, size: tuple[int, int] = (40, 20)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 120, 150)).save(path)
    return path


def make_manifest(folder: Path, *rows: dict[str, Any]) -> Path:
    make_picture(folder / "a.png")
    make_picture(folder / "b.png")
    path = folder / "manifest.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


ROW = {
    "image": "a.png",
    "label": "anomalous",
    "category": "tile",
    "defects": [{"type": "crack", "box": [4, 2, 12, 10]}],
}


def test_a_manifest_gives_normalised_boxes_and_references(tmp_path: Path) -> None:
    make_manifest(tmp_path, {**ROW, "reference": "b.png", "split": "val", "group": "g"})
    (sample,) = read(tmp_path)
    assert sample.defects[0].type == "crack"
    assert sample.defects[0].box == (0.1, 0.1, 0.3, 0.5)
    assert (sample.split, sample.group, sample.anomalous) == ("val", "g", True)
    assert sample.open().size == (40, 20)
    reference = sample.open_reference()
    assert reference is not None
    assert reference.size == (40, 20)


def test_a_row_with_a_crop_is_that_part_of_the_picture(tmp_path: Path) -> None:
    make_manifest(tmp_path, {**ROW, "crop": [10, 0, 30, 20], "reference": "b.png"})
    (sample,) = read(tmp_path / "manifest.jsonl")
    assert sample.defects[0].box == (0.2, 0.1, 0.6, 0.5)
    assert sample.open().size == (20, 20)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**ROW, "label": "odd"}, "neither normal nor anomalous"),
        ({**ROW, "split": "test"}, "neither train nor val"),
        ({**ROW, "image": "../a.png"}, "leads out"),
        ({**ROW, "reference": "/etc/passwd"}, "leads out"),
        ({**ROW, "defects": [{"type": "crack", "box": [5, 5, 5, 9]}]}, "empty or reversed"),
        ({**ROW, "defects": [{"type": "crack", "box": [50, 50, 60, 60]}]}, "outside"),
        ({**ROW, "defects": [{"type": "crack", "box": [1, 2, 3]}]}, "not enough values"),
        ({"label": "normal", "category": "tile"}, "image"),
        ({**ROW, "image": "none.png"}, "No such file"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    make_manifest(tmp_path, {"image": "b.png", "label": "normal", "category": "tile"}, row)
    with pytest.raises(BadDataError, match=f"line 2: .*{reason}"):
        read(tmp_path)


def test_an_mvtec_layout_gives_a_box_a_blot(tmp_path: Path) -> None:
    make_picture(tmp_path / "nut/train/good/000.png")
    make_picture(tmp_path / "nut/test/good/000.png")
    make_picture(tmp_path / "nut/test/bent/001.png")
    make_picture(tmp_path / "nut/test/rust/002.png")
    mask = np.zeros((20, 40), np.uint8)
    mask[2:10, 4:12] = 255
    mask[15:19, 30:36] = 255
    (tmp_path / "nut/ground_truth/bent").mkdir(parents=True)
    Image.fromarray(mask).save(tmp_path / "nut/ground_truth/bent/001_mask.png")
    samples = read(tmp_path)
    assert [(s.split, s.anomalous, len(s.defects), s.boxes_known) for s in samples] == [
        ("train", False, 0, True),
        ("val", True, 2, True),
        ("val", False, 0, True),
        ("val", True, 1, False),
    ]
    assert samples[1].defects[0].box == (0.1, 0.1, 0.3, 0.5)
    assert read(tmp_path / "nut") == samples


def test_plain_folders_name_the_type(tmp_path: Path) -> None:
    make_picture(tmp_path / "nut/good/1.png")
    make_picture(tmp_path / "nut/rust/2.jpg")
    good, rusty = read(tmp_path)
    assert (good.category, good.anomalous) == ("nut", False)
    assert (rusty.category, rusty.defects[0].type, rusty.boxes_known) == ("nut", "rust", False)


def test_what_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadDataError, match="no pictures"):
        read(tmp_path)
    with pytest.raises(BadDataError, match="neither"):
        read(tmp_path / "none")
    make_picture(tmp_path / "1.png")
    with pytest.raises(BadDataError, match="no folder"):
        read(tmp_path)


def test_specks_of_a_mask_are_no_defects() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[3, 3] = 255
    mask[10:14, 10:14] = 1
    assert boxes_of_mask(Image.fromarray(mask)) == [(0.5, 0.5, 0.7, 0.7)]


def test_the_procedural_set_reads_in_both_of_its_forms(tmp_path: Path) -> None:
    manifest = write_set(tmp_path, ("dotted_board",), per_category=4, variants_per_category=2)
    by_manifest = read(tmp_path)
    assert sum(sample.anomalous for sample in by_manifest) == 2
    assert all(sample.reference is not None for sample in by_manifest if sample.split == "val")
    manifest.unlink()
    by_layout = read(tmp_path)
    assert sorted(sample.image for sample in by_layout) == sorted(sample.image for sample in by_manifest)


@pytest.mark.skipif(not SHARED.exists(), reason="/work/shared/data is not on this machine")
@pytest.mark.parametrize(
    ("name", "category"),
    [("deeppcb", "bare_pcb"), ("deeppcb/crops320.jsonl", "bare_pcb"), ("magnetic_tile", "magnetic_tile")],
)
def test_the_real_sets_read(name: str, category: str) -> None:
    samples = read(SHARED / name)
    assert len(samples) > 1000
    assert {sample.category for sample in samples} == {category}
    assert all(sample.defects for sample in samples if sample.anomalous and sample.boxes_known)
    assert samples[0].open().mode == "RGB"
