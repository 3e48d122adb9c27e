"""The presets of RL: the paper's numbers, GPUs that hold them, and a step of a small model of each class.

Memory is counted in GB of 10⁹ bytes, a little less than what GPUs of that name have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from services.trainer import adapters
from services.trainer.learner import make_learner
from services.trainer.settings import RL_PRESETS, RlSettings, rl_preset
from services.vlm.render import Renderer
from tests.policy.checkpoints import Architecture, make_tiny_checkpoint
from tests.trainer.make_learners import ONE, make_rollouts

GPU_GB = 80.0
EPISODE_GB = 20.0  # as the presets' comment has it
ARCHITECTURES: dict[str, Architecture] = {"qwen2.5-vl-3b": "qwen2_5_vl", "qwen3-vl-4b": "qwen3_vl"}


def make_qwen2_5_vl_3b() -> Any:
    """Of the published sizes, without memory."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text = {
        "vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008, "num_hidden_layers": 36,
        "num_attention_heads": 16, "num_key_value_heads": 2, "rope_parameters": rope, "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
        "patch_size": 14, "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        )


def make_qwen3_vl_4b() -> Any:
    """Of the published sizes, without memory."""
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    text = {
        "vocab_size": 151_936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_parameters": rope,
        "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16, "out_hidden_size": 2560,
        "patch_size": 16, "num_position_embeddings": 2304, "deepstack_visual_indexes": [5, 11, 17],
    }  # fmt: skip
    with torch.device("meta"):
        return Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
        )


FULL_SIZE: dict[str, Callable[[], Any]] = {"qwen2.5-vl-3b": make_qwen2_5_vl_3b, "qwen3-vl-4b": make_qwen3_vl_4b}


def billions(module: nn.Module, *, trained: bool) -> float:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad == trained) / 1e9


def resident_gb(model: nn.Module, *, reference: bool) -> float:
    """Weights, gradients and Adam's state, of all ranks together."""
    trained, frozen = billions(model, trained=True), billions(model, trained=False)
    return 16 * trained + 4 * frozen + (4 * (trained + frozen) if reference else 0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_it_has_the_papers_hyper_parameters(name: str, tmp_path: Path) -> None:
    settings = rl_preset(name, out=tmp_path, base=tmp_path)
    assert settings.group_size == 8
    assert settings.adam_lr == 1e-6
    assert settings.clip_low == settings.clip_high == 0.2
    assert settings.kl == 0.1
    assert settings.temperature == 1.0
    assert settings.reward == "paper"
    assert settings.divide_by_std
    assert settings.prompts == 366
    assert settings.steps * settings.groups == pytest.approx(3 * settings.prompts, abs=settings.groups)
    assert settings.muon_lr == settings.lora_rank == 0


@pytest.mark.parametrize(("name", "expected"), [("qwen2.5-vl-3b", 67), ("qwen3-vl-4b", 84)])
def test_two_gpus_of_80_gb_hold_it_and_one_does_not(name: str, expected: int) -> None:
    model = FULL_SIZE[name]()
    model.model.visual.requires_grad_(False)
    resident = resident_gb(model, reference=True)
    assert round(resident) == expected
    assert resident + EPISODE_GB > GPU_GB > resident / 2 + EPISODE_GB


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_make_one_gpu_enough(name: str) -> None:
    model = FULL_SIZE[name]()
    adapters.adapt(model, 64)
    assert billions(model, trained=True) == pytest.approx(0.125, abs=0.01)
    assert resident_gb(model, reference=False) + EPISODE_GB < GPU_GB / 1.5


@pytest.mark.parametrize("lora_rank", [0, 4])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_small_model_of_its_class_learns(name: str, lora_rank: int, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = make_tiny_checkpoint(tmp_path / "base", ARCHITECTURES[name])
    settings = rl_preset(name, out=tmp_path, base=base, lora_rank=lora_rank)
    renderer = Renderer.from_checkpoint(base)
    learner = make_learner(settings, renderer, ONE)
    before = {key: value.clone() for key, value in learner.policy.model.state_dict().items()}
    found = [learner.step(make_rollouts(renderer, 4, step), step / settings.steps) for step in range(2)]
    assert all(math.isfinite(value) for metrics in found for value in metrics.values())
    assert all(metrics["policy/gradient_norm"] > 0 for metrics in found)
    changed = {key for key, value in learner.policy.model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    assert not any("visual" in key for key in changed)
    assert all(("lora_" in key) == bool(lora_rank) for key in changed)
    learner.save(base, tmp_path / "version")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "version")
    assert saved.dtype == torch.bfloat16


def test_every_preset_is_of_valid_settings(tmp_path: Path) -> None:
    for name in RL_PRESETS:
        assert isinstance(rl_preset(name, out=tmp_path, base=tmp_path), RlSettings)
