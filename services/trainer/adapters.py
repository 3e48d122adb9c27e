"""Low-rank adapters (LoRA, Hu et al. 2021) on a policy's language model; merged, they are an ordinary checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

# Every linear map of the decoder layers, in attention and MLP; the names of Qwen2.5-VL and of Qwen3-VL.
_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
# How much an adapter counts, lora_alpha / rank: constant, so that a learning rate fits any rank.
_SCALE = 2


def adapt(model: Any, rank: int) -> None:
    """Puts adapters into `model` in place; nothing else of it is trained from then on. They begin as zero, their first
    factors as random numbers of torch's generator. Raises ValueError: the model has none of the layers.
    """
    config = LoraConfig(r=rank, lora_alpha=_SCALE * rank, lora_dropout=0.0, target_modules=_TARGETS)
    inject_adapter_in_model(config, model)


def merged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole weights of an adapted model → those of the same model without adapters, under its own names. Without
    adapters: the same weights.
    """
    plain = {}
    for name, value in weights.items():
        stem = name.removesuffix(".base_layer.weight")
        if stem != name:
            plain[f"{stem}.weight"] = value + _SCALE * (
                weights[f"{stem}.lora_B.default.weight"] @ weights[f"{stem}.lora_A.default.weight"]
            )
        elif ".lora_" not in name:
            plain[name.replace(".base_layer.", ".")] = value
    return plain
