"""`train` from end to end, small: the published folder is a checkpoint with a card."""

import json
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from agentiad.v1 import trajectory_pb2 as pb
from services.data import procedural
from services.data.procedural import write_set
from services.trainer import heldout, sft
from services.trainer.folders import OccupiedError
from services.trainer.settings import preset
from services.vlm import pocket
from services.vlm.card import read_card
from services.vlm.checkpoint import load
from tests.trainer.make_runs import TINY, make_settings


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket, "Shape", lambda: TINY)
    monkeypatch.setattr(sft, "_HELD_OUT_PER_CATEGORY", 1)


def test_a_pocket_is_trained_from_nothing_and_measured(tmp_path: Path) -> None:
    out = sft.train(make_settings(tmp_path / "out"), Console(quiet=True))
    card = read_card(out)
    assert set(card.categories) == set(procedural.CATEGORIES)
    assert card.comparison_view == pb.COMPARISON_VIEW_COMPOSITE
    assert {"balanced_accuracy", "balanced_accuracy_without_tools", "training_seconds"} <= set(card.quality)
    assert load(out).card.version == card.version
    metrics = [json.loads(line) for line in (out / sft.METRICS).read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5]
    assert not (out / "work").exists()


def test_a_checkpoint_is_tuned_on_a_folder(tmp_path: Path) -> None:
    write_set(tmp_path / "set", ("pin_board", "woven"), per_category=4, variants_per_category=2)
    first = sft.train(make_settings(tmp_path / "first", samples=6), Console(quiet=True))
    settings = make_settings(tmp_path / "second", samples=8, data=str(tmp_path / "set"), base=first)
    card = read_card(sft.train(settings, Console(quiet=True)))
    assert card.categories == ["pin_board", "woven"]
    assert card.base_model == "pocket"
    assert card.version != read_card(first).version


def test_a_folder_of_another_run_is_left_alone(tmp_path: Path) -> None:
    settings = make_settings(tmp_path / "out", samples=6)
    (settings.out / "work").mkdir(parents=True)
    (settings.out / "work" / "settings").write_text(settings.identity())
    with pytest.raises(OccupiedError, match="other settings"):
        sft.train(make_settings(settings.out, samples=6, seed=1), Console(quiet=True))
    sft.train(settings, Console(quiet=True))
    with pytest.raises(OccupiedError, match="holds a checkpoint already"):
        sft.train(settings, Console(quiet=True))


def test_a_frozen_tower_needs_a_base(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs a base"):
        preset("pretrained", out=tmp_path)


def test_held_out_outcomes_are_counted() -> None:
    part = procedural.make_part("woven", 1, 1, "dent")
    box = part.defects[0].box
    trajectory = pb.Trajectory(verdict=pb.Verdict(anomaly_present=True))
    call = pb.ToolCall(name="crop_image_normalized")
    region = pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])
    trajectory.turns.add(tool_call=call)
    trajectory.turns.add(observation=pb.Observation(image=pb.ImageReference(uri="x"), region=region))
    hit = heldout.Outcome(part, trajectory)
    missed = heldout.Outcome(procedural.make_part("woven", 1, 1, None), trajectory)
    assert (hit.right, hit.hit, hit.tools) == (True, True, ["crop_image_normalized"])
    assert not missed.right
    assert heldout.balanced_accuracy([hit, missed]) == 0.5


def test_held_out_parts_are_of_unseen_variants() -> None:
    cases = heldout.cases(2, 2)
    assert len(cases) == 2 * len(procedural.CATEGORIES)
    assert all(case.part.variant >= procedural.TRAINING_VARIANTS for case in cases)
    assert all(isinstance(case.exemplar, Image.Image) for case in cases)
