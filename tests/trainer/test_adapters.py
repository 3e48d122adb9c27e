"""Adapters: what is trained, and that their merger is the policy that was trained."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from services.trainer import adapters
from services.trainer.learner import Learner, make_learner
from services.vlm import checkpoint
from services.vlm.card import write_card
from services.vlm.render import Renderer
from tests.policy.checkpoints import Architecture, make_card, make_tiny_checkpoint
from tests.trainer.make_learners import ONE, make_lesson, make_rollouts


@pytest.fixture(scope="module", params=get_args(Architecture))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("base") / request.param, request.param)


def make(base: Path, **changes: object) -> Learner:
    torch.set_num_threads(1)
    settings = make_lesson(base, Path("unused"), **{"lora_rank": 4, "adam_lr": 1e-2, **changes}).settings
    return make_learner(settings, Renderer.from_checkpoint(base), ONE)


def learn(learner: Learner, steps: int = 2) -> list[dict[str, float]]:
    renderer = Renderer.from_checkpoint(learner.settings.base)
    return [learner.step(make_rollouts(renderer, 4, step), 0.0) for step in range(steps)]


def words(model: nn.Module) -> Tensor:
    """Log-probabilities after each word of a text."""
    with torch.no_grad():
        logits: Tensor = model.eval()(input_ids=torch.arange(40)[None]).logits
    return logits.log_softmax(-1)


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return set(weights.keys())


def test_only_adapters_of_the_language_model_are_trained(base: Path) -> None:
    model = make(base).policy.model
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    layer = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    layer |= {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert trained == {
        f"model.language_model.layers.{number}.{linear}.lora_{factor}.default.weight"
        for number in range(2)
        for linear in layer
        for factor in "AB"
    }


def test_they_begin_as_the_base(base: Path) -> None:
    (ours,), (plain,) = learn(make(base), 1), learn(make(base, lora_rank=0), 1)
    for name in ("policy/entropy", "policy/mismatch_mean", "policy/mismatch_max"):
        assert ours[name] == plain[name]


def test_what_is_saved_says_what_the_adapted_model_says(base: Path, tmp_path: Path) -> None:
    learner = make(base)
    learn(learner)
    adapted = words(learner.policy.model)
    learner.save(base, tmp_path / "version")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "version")
    torch.testing.assert_close(words(saved), adapted, rtol=0, atol=1e-5)
    before = words(AutoModelForImageTextToText.from_pretrained(base))
    assert (adapted - before).abs().max() > 0.01


def test_what_is_saved_is_a_checkpoint_like_the_base(base: Path, tmp_path: Path) -> None:
    learner = make(base)
    learner.save(base, tmp_path / "version")
    assert names(tmp_path / "version") == names(base)
    write_card(tmp_path / "version", make_card())
    assert checkpoint.load(tmp_path / "version").card.version == make_card().version


def test_to_save_leaves_the_adapters_in_training(base: Path, tmp_path: Path) -> None:
    saving, other = make(base), make(base)
    for learner in (saving, other):
        learn(learner, 1)
    saving.save(base, tmp_path / "version")
    assert learn(saving) == learn(other)


def test_the_reference_is_the_model_without_them(base: Path) -> None:
    """As a second copy of the base would be, and training goes on with them."""
    learner = make(base, kl=0.1)
    assert learner.reference is None
    distances = [metrics["policy/kl"] for metrics in learn(learner, 3)]
    assert distances[0] == 0.0
    assert 0.0 < distances[1] < distances[2]
    with_copy = make(base, kl=0.1)
    with_copy.reference = make(base, lora_rank=0).policy
    assert [metrics["policy/kl"] for metrics in learn(with_copy, 3)] == pytest.approx(distances, rel=1e-3, abs=1e-7)


def test_a_model_without_adapters_is_merged_to_itself(base: Path) -> None:
    weights = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    merged = adapters.merged(weights)
    assert merged.keys() == weights.keys()
    assert all(torch.equal(merged[name], value) for name, value in weights.items())
