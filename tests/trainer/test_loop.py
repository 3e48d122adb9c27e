"""The loop: it learns, and a run that was killed ends where an undisturbed one does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from services.trainer import dataset
from services.trainer.batching import Example
from services.trainer.loop import Loop
from services.trainer.settings import SftSettings
from services.vlm.render import Renderer
from tests.policy.checkpoints import Architecture, make_tiny_checkpoint
from tests.trainer.make_runs import make_pocket, make_recipe, make_settings


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pocket(tmp_path_factory.mktemp("base"), make_recipe())


@pytest.fixture(scope="module")
def examples(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    return dataset.build(make_recipe(), base, tmp_path_factory.mktemp("cache"), 1, lambda n: None)


def make_loop(base: Path, examples: list[Example], settings: SftSettings, labels: int = 11) -> Loop:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings.out.mkdir(exist_ok=True)
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    return Loop(settings, model, Renderer.from_checkpoint(base), examples, labels, settings.out)


def losses_of(loop: Loop) -> list[dict[str, float]]:
    seen: list[dict[str, float]] = []
    loop.run(seen.append)
    return seen


def test_a_killed_run_goes_on_to_the_same_parameters(base: Path, examples: list[Example], tmp_path: Path) -> None:
    whole = make_loop(base, examples, make_settings(tmp_path / "whole", epochs=2.0))
    whole.run(lambda metrics: None)
    settings = make_settings(tmp_path / "killed", epochs=2.0, checkpoint_minutes=0.0)

    def kill(metrics: dict[str, float]) -> None:
        # Two steps after the last checkpoint that a resumed run can find.
        if metrics["step"] == 5:
            raise KilledError

    with pytest.raises(KilledError):
        make_loop(base, examples, settings).run(kill)
    resumed = make_loop(base, examples, settings)
    assert resumed.resume()
    assert resumed.step == 4
    resumed.run(lambda metrics: None)
    for name, parameter in whole.model.state_dict().items():
        assert torch.equal(parameter, resumed.model.state_dict()[name]), name


def test_pretext_comes_first_and_stays_beside(base: Path, examples: list[Example], tmp_path: Path) -> None:
    metrics = losses_of(make_loop(base, examples, make_settings(tmp_path / "run")))
    assert ["loss" in step for step in metrics] == [False, False, True, True, True]
    assert all("pretext" in step for step in metrics)


def test_a_frozen_tower_does_not_move(base: Path, examples: list[Example], tmp_path: Path) -> None:
    loop = make_loop(base, examples, make_settings(tmp_path / "run", base=base, freeze_vision=True))
    before = {name: parameter.clone() for name, parameter in loop.vision.named_parameters()}
    loop.run(lambda metrics: None)
    assert loop.heads is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in loop.vision.named_parameters())


@pytest.mark.parametrize("architecture", ["qwen2_5_vl", "qwen3_vl"])
def test_a_few_steps_lower_the_loss_of_any_qwen_vl(architecture: Architecture, tmp_path: Path) -> None:
    base = make_tiny_checkpoint(tmp_path / "base", architecture)
    examples = dataset.build(make_recipe(8), base, tmp_path / "cache", 1, lambda n: None)
    settings = make_settings(
        tmp_path / "run", batch=8, epochs=8.0, pretext_steps=0, base=base, freeze_vision=True, adam_lr=3e-3
    )
    losses = [step["loss"] for step in losses_of(make_loop(base, examples, settings, labels=0))]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_no_number_stops_the_run(base: Path, examples: list[Example], tmp_path: Path) -> None:
    loop = make_loop(base, examples, make_settings(tmp_path / "run"))
    parameter: Any = loop.model.get_input_embeddings().weight
    with torch.no_grad():
        parameter.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="step"):
        loop.run(lambda metrics: None)
