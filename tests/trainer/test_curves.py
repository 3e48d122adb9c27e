"""The picture of a run: everything that was measured is on it, and no metrics are too strange for it."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image, ImageColor

from services.trainer import curves
from services.trainer.curves import arranged, draw, read_series, smoothed

Row = dict[str, object]


def make_metrics(folder: Path, rows: list[Row]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def drawn(folder: Path, rows: list[Row]) -> Image.Image:
    target = folder / "curves.png"
    draw(make_metrics(folder, rows), target)
    with Image.open(target) as picture:
        assert picture.format == "PNG"
        return picture.convert("RGB")


def count(picture: Image.Image, colour: str) -> int:
    wanted = ImageColor.getrgb(colour)
    return sum(times for times, seen in picture.getcolors(picture.width * picture.height) or [] if seen == wanted)


def test_a_run_is_drawn_in_panels_of_its_groups(tmp_path: Path) -> None:
    names = ["reward/total", "reward/verdict", "policy/kl", "policy/entropy", "accuracy/sampled"]
    picture = drawn(tmp_path, [{"step": i, **{name: math.sin(i / 9) for name in names}} for i in range(1, 121)])
    assert picture.width == round((2 * 0.3 + 4 * 3.7) * 110)
    flat = drawn(tmp_path, [{"step": i, **dict.fromkeys(names)} for i in range(1, 121)])
    for i in range(3):
        # Curves, beyond the heading and its line, which are there without them too.
        assert count(picture, curves._COLOURS[i]) > count(flat, curves._COLOURS[i]) + 300, i
    assert count(picture, curves._COLOURS[3]) == 0


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [{"step": 1}],
        [{"step": 5, "loss": 0.5}],
        [{"step": 0, "a/b": 0.0}, {"step": 1, "c/d": 1.0}],
        [{"step": i, "a/b": math.nan, "a/c": None, "a/d": math.inf} for i in range(3)],
        [{"step": i, "a/b": -1e200 if i == 2 else 1e-200} for i in range(5)],
        [{"step": 1, "$x^{$/$\\frac$": 1.0, "a": "words", "": 2.0, "/": 1.0, "a//b/c": True}],
        [{"step": 10**9 + i, "a/b": 12_345.678 * i} for i in range(2)],
    ],
    ids=["none", "no metrics", "one step", "missing keys", "no numbers", "extremes", "names", "large steps"],
)
def test_nothing_is_too_strange(tmp_path: Path, rows: list[Row]) -> None:
    picture = drawn(tmp_path, rows)
    assert count(picture, curves._INK) > 100  # the title at least


def test_series_hold_the_numbers_by_step(tmp_path: Path) -> None:
    path = make_metrics(
        tmp_path, [{"step": 3, "b": 1.0, "a": 2}, {"step": 1, "a": math.nan}, {"step": 2, "a": None, "c": "word"}]
    )
    assert read_series(path) == {"a": [(3, 2)], "c": [], "b": [(3, 1.0)]}


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = make_metrics(tmp_path, [{"step": 1, "a": 1.0}])
    with path.open("a") as stream:
        stream.write('{"step": 2, "a"')
    assert read_series(path) == {"a": [(1, 1.0)]}


def test_every_metric_has_one_place_of_its_own_and_groups_stay_together() -> None:
    sizes = {"reward": 5, "tools": 4, "policy": 10, "staleness": 2, "idle": 2, "speed": 3, "accuracy": 1}
    names = [f"{group}/{i}" for group, size in sizes.items() for i in range(size)]
    blocks = arranged(names)
    cells = [(block.row, block.column + i) for block in blocks for i in range(len(block.names))]
    assert len(set(cells)) == len(names)
    assert {column for _, column in cells} == {0, 1, 2, 3}
    assert [name for block in blocks for name in block.names] == names
    for group, size in sizes.items():
        mine = [block for block in blocks if block.group == group]
        assert len(mine) == math.ceil(size / 4)
        rows = [block.row for block in mine]
        assert rows == sorted(set(rows))
        assert len({block.colour for block in mine}) == 1
    # 27 panels in rows of four: the gaps cost one row at most.
    assert max(row for row, _ in cells) + 1 <= 8


def test_smoothing_keeps_what_is_smooth_and_does_not_lag() -> None:
    assert smoothed([0.7] * 50) == pytest.approx([0.7] * 50)
    ramp = [float(i) for i in range(101)]
    assert smoothed(ramp)[50] == pytest.approx(50)
    assert smoothed(ramp)[::-1] == pytest.approx(smoothed(ramp[::-1]))


def test_smoothing_takes_out_noise_and_leaves_short_runs_nearly_alone() -> None:
    noise = [(-1.0) ** i for i in range(200)]
    assert max(map(abs, smoothed(noise)[20:-20])) < 0.1
    assert smoothed([3.0]) == [3.0]
    assert smoothed([0.0, 1.0]) == pytest.approx([0.27, 0.73], abs=0.01)
    assert smoothed([]) == []
