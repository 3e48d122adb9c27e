"""Tiny random checkpoints of the real model classes, as folders that look like the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from agentiad.v1.policy_pb2 import PolicyCard
from services.vlm.card import write_card

Architecture = Literal["qwen3_vl", "qwen2_5_vl"]

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
    "<|video_pad|>",
)  # fmt: skip
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>")
CORPUS = (
    "system user assistant You inspect industrial parts. Image 1: bottle. Image 2: closer, [0.10,0.20,0.30,0.40].",
    '{"anomaly_present":true,"top_anomaly":"scratch","bbox_2d":[0.1,0.2,0.3,0.4],"visual_descriptions":["a scratch"]}',
    '{"anomaly_present":false,"top_anomaly":"none","bbox_2d":[],"visual_descriptions":[]}',
    '"anomaly_present": true "anomaly_present": false',
    '{"name":"crop_image_normalized","arguments":{"bbox_2d":[0.5,0.6,0.7,0.8],"target_image":1}}',
    '{"name":"query_image","arguments":{}}',
)
# The markup that the models of this family were trained on, in the words of this project.
TEMPLATE = """\
{%- if messages[0].role != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(corpus: Sequence[str] = CORPUS, vocabulary_size: int = 420) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `corpus`, with the special tokens of the Qwen-VL family."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(corpus, trainer)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_tiny_checkpoint(
    path: Path,
    architecture: Architecture = "qwen3_vl",
    *,
    seed: int = 0,
    hidden: int = 64,
    heads: int = 2,
    layers: int = 2,
    vision_hidden: int = 32,
    vision_depth: int = 2,
    patch: int = 8,
    image_size: int = 64,
    version: str = "tiny-1",
) -> Path:
    """Writes a random checkpoint; images of any size become about `image_size`² pixels.

    `hidden` / `heads` of 32 is the smallest that vLLM serves.
    """
    tokenizer = make_tokenizer()
    # Rows of the output layer that stand for no token, as in the real checkpoints.
    vocabulary_size = len(tokenizer) + 5
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    text: dict[str, Any] = {
        "vocab_size": vocabulary_size,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    tokens = {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    model = (_qwen3 if architecture == "qwen3_vl" else _qwen2_5)(
        text, tokens, _vision(hidden, vision_hidden, vision_depth, patch)
    )
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    # Random weights of the usual size give nearly flat distributions; larger ones give texts that differ by prompt.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    pixels = image_size * image_size
    Qwen2VLImageProcessorPil(
        patch_size=patch, merge_size=2, temporal_patch_size=2, size={"shortest_edge": pixels, "longest_edge": pixels}
    ).save_pretrained(path)
    write_card(path, make_card(version))
    return path


def make_card(version: str = "tiny-1") -> PolicyCard:
    return PolicyCard(version=version, base_model="random", categories=["bottle"], training_data=["none"])


def _vision(hidden: int, width: int, depth: int, patch: int) -> dict[str, Any]:
    return {
        "depth": depth, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": 2, "patch_size": patch,
        "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": hidden,
    }  # fmt: skip


def _qwen3(text: dict[str, Any], tokens: dict[str, Any], vision: dict[str, Any]) -> Any:
    head = text["hidden_size"] // text["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _sections(head), "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={**text, "head_dim": head, "rope_parameters": rope},
        vision_config={**vision, "num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1]},
        **tokens,
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen2_5(text: dict[str, Any], tokens: dict[str, Any], vision: dict[str, Any]) -> Any:
    head = text["hidden_size"] // text["num_attention_heads"]
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": _sections(head)}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, "window_size": 32, "fullatt_block_indexes": [vision["depth"] - 1]},
        **tokens,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _sections(head: int) -> list[int]:
    """Time, height and width shares of half a head, for M-RoPE."""
    spatial = head // 6
    return [head // 2 - 2 * spatial, spatial, spatial]
