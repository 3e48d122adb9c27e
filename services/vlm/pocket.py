"""Pocket: a Qwen3-VL of two million parameters that a laptop trains and runs; stock classes, made from nothing.

What is its own is the vocabulary: a byte-level BPE that may join words (the few sentences of the prompt protocol become
a handful of tokens each), and one token for each hundredth of a coordinate, whose embeddings start as Fourier features
so that near numbers begin as near tokens.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

# The specials of Qwen-VL, by their own names.
PADDING, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIALS = (PADDING, TURN_START, TURN_END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>")
COORDINATES = tuple(f"{step / 100:.2f}" for step in range(101))
# Whole tokens whatever stands around them: the protocol's tags, the two verdicts, the coordinates.
WHOLE_WORDS = (*TAGS, "true", "false", *COORDINATES)

_ATTENTION_GAIN = 1.7

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes. The head size 32 is one that vLLM serves."""

    vocabulary: int = 1280
    image_side: int = 96  # pixels; every view has about side x side of them, in its own aspect
    patch: int = 8
    merge: int = 2
    vision_width: int = 96
    vision_depth: int = 4
    deepstack: tuple[int, ...] = (0, 2)
    width: int = 128
    depth: int = 4
    head: int = 32
    key_value_heads: int = 2
    feed_forward: int = 3  # times the width
    max_positions: int = 4096


@dataclass(frozen=True)
class Pocket:
    model: Any
    tokenizer: PreTrainedTokenizerFast
    shape: Shape

    def save(self, path: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        """Writes a folder that the Auto classes load offline."""
        self.tokenizer.save_pretrained(path)
        (path / "preprocessor_config.json").write_text(json.dumps(_image_processor(self.shape), indent=2) + "\n")
        state = {name: tensor.to(dtype) for name, tensor in self.model.state_dict().items()}
        self.model.config.dtype = dtype
        self.model.save_pretrained(path, state_dict=state)


def build(corpus: Iterable[str], seed: int, shape: Shape | None = None) -> Pocket:
    """A fresh, untrained pocket. `corpus`: texts as they will be met; they decide what becomes one token."""
    shape = shape or Shape()
    tokenizer = train_tokenizer(corpus, shape.vocabulary)
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(_config(tokenizer, shape))
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.convert_tokens_to_ids(TURN_END), pad_token_id=tokenizer.pad_token_id
    )
    _order_coordinates(model, tokenizer)
    _sharpen(model)
    return Pocket(model, tokenizer, shape)


def train_tokenizer(corpus: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Any UTF-8 text can be encoded, and comes back as it was: every byte is a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    whole = re.compile("|".join(re.escape(word) for word in WHOLE_WORDS))
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIALS) - len(WHOLE_WORDS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in corpus for piece in whole.split(text) if piece), trainer)
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in WHOLE_WORDS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PADDING,
        eos_token=TURN_END,
        additional_special_tokens=list(SPECIALS[1:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, shape: Shape) -> Qwen3VLConfig:
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    half = shape.head // 2
    side = shape.image_side // shape.patch
    return Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": shape.width,
            "intermediate_size": shape.width * shape.feed_forward,
            "num_hidden_layers": shape.depth,
            "num_attention_heads": shape.width // shape.head,
            "num_key_value_heads": shape.key_value_heads,
            "head_dim": shape.head,
            "max_position_embeddings": shape.max_positions,
            "rope_parameters": {
                "rope_type": "default",
                # Slow: two thirds of the small heads' dimensions hardly turn, so that content is found at any distance.
                "rope_theta": 1_000_000.0,
                "mrope_interleaved": True,
                "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            },
            "tie_word_embeddings": True,
            "pad_token_id": ids[PADDING],
            "eos_token_id": ids[TURN_END],
        },
        vision_config={
            "depth": shape.vision_depth,
            "hidden_size": shape.vision_width,
            "intermediate_size": shape.vision_width * 4,
            "num_heads": shape.vision_width // shape.head,
            "patch_size": shape.patch,
            "spatial_merge_size": shape.merge,
            "temporal_patch_size": 2,
            "out_hidden_size": shape.width,
            "num_position_embeddings": side * side,
            "deepstack_visual_indexes": list(shape.deepstack),
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def _image_processor(shape: Shape) -> dict[str, object]:
    pixels = shape.image_side**2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "patch_size": shape.patch,
        "merge_size": shape.merge,
        "temporal_patch_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def _order_coordinates(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    """Near coordinates start with near embeddings: Fourier features of the value, at the size of the other rows."""
    table = model.get_input_embeddings().weight
    ids = torch.tensor(tokenizer.convert_tokens_to_ids(list(COORDINATES)))
    values = torch.linspace(0, 1, len(COORDINATES))[:, None]
    waves = 2.0 ** torch.linspace(-1, 4, table.shape[1] // 2)[None, :] * torch.pi * values
    features = torch.cat([waves.sin(), waves.cos()], dim=1)
    with torch.no_grad():
        table[ids] = features / features.std() * table.std()


def _sharpen(model: Any) -> None:
    """Lets heads of 32 single out one token of a hundred from the start.

    Queries and keys are normalised, so that a logit is at most sqrt(head) times the product of the two gains: 5.7 at
    the usual gain of one, and these gains learn slowly.
    """
    for layer in model.model.language_model.layers:
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.constant_(norm.weight, _ATTENTION_GAIN)
