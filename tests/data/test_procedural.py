"""Procedural parts: deterministic, balanced, and without a shortcut past the tools."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from services.data import procedural
from services.data.layouts import LAYOUTS
from services.data.procedural import CATEGORIES, DEFECTS, make_part, make_set
from services.data.textures import MARKS, TEXTURES, mark
from services.zoom.registration import register


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_same_arguments_give_the_same_pixels(category: str) -> None:
    first, second = (make_part(category, 3, 5, DEFECTS[category][0]) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert first.defects == second.defects
    assert make_part(category, 4, 5, None).image.tobytes() != make_part(category, 5, 5, None).image.tobytes()


@pytest.mark.parametrize(("category", "kind"), [(c, kind) for c in CATEGORIES for kind in DEFECTS[c]])
def test_a_defect_has_its_type_and_a_box_inside(category: str, kind: str) -> None:
    (defect,) = make_part(category, 1, 2, kind).defects
    x1, y1, x2, y2 = defect.box
    assert defect.type == kind or category in LAYOUTS
    assert 0 <= x1 < x2 <= 1
    assert 0 <= y1 < y2 <= 1
    assert max(x2 - x1, y2 - y1) < 0.2


@pytest.mark.parametrize(("category", "kind"), [(c, kind) for c in LAYOUTS for kind in DEFECTS[c]])
def test_a_spoiled_layout_differs_from_the_good_one_inside_the_box_alone(category: str, kind: str) -> None:
    good = np.asarray(make_part(category, 8, 9, None, smudged=False).image, np.int16)
    part = make_part(category, 8, 9, kind, smudged=False)
    different = np.abs(np.asarray(part.image, np.int16) - good).max(axis=2) > 12
    x1, y1, x2, y2 = (round(value * procedural.SIZE) for value in part.defects[0].box)
    assert different[y1:y2, x1:x2].any()
    different[max(y1 - 3, 0) : y2 + 3, max(x1 - 3, 0) : x2 + 3] = False
    assert not different.any()


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="no defect 'rust'"):
        make_part("woven", 0, 0, "rust")
    with pytest.raises(ValueError, match="cheese"):
        make_part("cheese", 0, 0, None)


@pytest.mark.parametrize("kind", MARKS)
def test_a_smudge_is_as_dark_as_a_defect_and_wider(kind: str) -> None:
    def darkness(soft: bool) -> tuple[float, float]:
        tiles = [mark(kind, np.random.default_rng(seed), soft)[0] for seed in range(40)]
        return float(np.mean([tile.sum() for tile in tiles])), float(np.mean([tile.max() for tile in tiles]))

    (sharp_sum, sharp_peak), (soft_sum, soft_peak) = darkness(False), darkness(True)
    assert soft_sum == pytest.approx(sharp_sum, rel=0.01)
    assert soft_peak < 0.7 * sharp_peak


@pytest.mark.parametrize("category", TEXTURES)
def test_the_statistics_of_a_texture_do_not_tell_its_label(category: str) -> None:
    """Mean, spread and darkest value of the 96 px first view, the best threshold on each: about chance."""
    labels, features = [], []
    for seed in range(120):
        kind = MARKS[seed // 2 % 3] if seed % 2 else None
        view = make_part(category, seed, seed // 4, kind, smudged=True).image.resize((96, 96), Image.Resampling.BICUBIC)
        grey = np.asarray(view.convert("L"), np.float32)
        labels.append(kind is not None)
        features.append([grey.mean(), grey.std(), grey.min() - np.median(grey)])
    for feature in np.array(features).T:
        rank = np.argsort(np.argsort(feature))
        anomalous = np.array(labels)
        pairs = anomalous.sum() * (~anomalous).sum()
        auroc = (rank[anomalous].sum() - anomalous.sum() * (anomalous.sum() - 1) / 2) / pairs
        assert abs(auroc - 0.5) < 0.25, (category, auroc)


@pytest.mark.parametrize("category", LAYOUTS)
def test_units_of_a_variant_align_and_those_of_another_do_not(category: str) -> None:
    aligned = []
    for variant in range(10, 18):
        exemplar = make_part(category, procedural.exemplar_seed(1), variant, None).image
        aligned.append(register(make_part(category, 1, variant, DEFECTS[category][0]).image, exemplar).registered)
        assert not register(make_part(category, 1, variant + 1, None).image, exemplar).registered
    assert sum(aligned) >= 7


def test_a_set_is_balanced_whatever_the_variant() -> None:
    parts = list(make_set(("circuit",), 200, 7, range(10)))
    assert sum(bool(part.defects) for part in parts) == 100
    odd = [bool(part.defects) for part in parts if part.variant % 2]
    assert 0.35 < np.mean(odd) < 0.65


def test_a_written_set_reads_as_its_manifest_says(tmp_path: Path) -> None:
    manifest = procedural.write_set(tmp_path, ("woven", "pin_board"), per_category=4, variants_per_category=2)
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert len(rows) == 2 * (2 + 4)
    assert all((tmp_path / row["image"]).exists() for row in rows)
    tested = [row for row in rows if row["split"] == "val"]
    assert all(row["reference"] in {r["image"] for r in rows if r["split"] == "train"} for row in tested)
    assert {row["label"] for row in tested} == {"normal", "anomalous"}
