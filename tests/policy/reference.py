"""What the stock transformers code says, for comparison."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.vlm.checkpoint import LoadedPolicy
from services.vlm.render import ImageChunk


def inputs(policy: LoadedPolicy, messages: Sequence[pb.Message]) -> dict[str, Any]:
    """The model's keyword arguments for a prompt whose images come as content."""
    chunks = policy.renderer.render(messages)
    images = [Image.open(io.BytesIO(c.image.content)).convert("RGB") for c in chunks if isinstance(c, ImageChunk)]
    pixels = policy.renderer.pixels(images) if images else {}
    ids = torch.tensor([policy.renderer.expand(chunks, pixels.get("image_grid_thw", []))])
    kinds = (ids == policy.renderer.image_token_id).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, **pixels}


def greedy_ids(policy: LoadedPolicy, messages: Sequence[pb.Message], count: int) -> list[int]:
    """model.generate, greedy."""
    arguments = inputs(policy, messages)
    policy.model.model.rope_deltas = None
    output = policy.model.generate(
        **arguments, do_sample=False, max_new_tokens=count, suppress_tokens=list(policy.vocabulary.banned_ids)
    )
    return output[0, arguments["input_ids"].shape[1] :].tolist()  # type: ignore[no-any-return]


def log_probabilities(policy: LoadedPolicy, messages: Sequence[pb.Message], generated: Sequence[int]) -> torch.Tensor:
    """[generated + 1, vocabulary]: before each generated id and after the last, from one forward over everything."""
    arguments = inputs(policy, messages)
    prompt = arguments["input_ids"].shape[1]
    extra = torch.tensor([list(generated)], dtype=torch.long)
    arguments["input_ids"] = torch.cat([arguments["input_ids"], extra], dim=1)
    arguments["attention_mask"] = torch.ones_like(arguments["input_ids"])
    arguments["mm_token_type_ids"] = (arguments["input_ids"] == policy.renderer.image_token_id).int()
    policy.model.model.rope_deltas = None
    with torch.inference_mode():
        logits = policy.model(**arguments).logits[0, prompt - 1 :]
    return logits.float().log_softmax(dim=-1)  # type: ignore[no-any-return]


def verdict_probability(policy: LoadedPolicy, distribution: torch.Tensor) -> float:
    """P(true) / (P(true) + P(false)) of one distribution [vocabulary]."""
    true = distribution[list(policy.vocabulary.true_ids)].exp().sum()
    false = distribution[list(policy.vocabulary.false_ids)].exp().sum()
    return float(true / (true + false))
