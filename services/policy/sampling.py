"""Choosing the next tokens of a batch, each row by its own temperature, top-p and random number."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from agentiad.v1 import trajectory_pb2 as pb

# Beyond it a policy speaks noise.
_HOTTEST = 2


def check(sampling: pb.Sampling) -> None:
    """Raises ValueError: a parameter outside its range."""
    if not 0 <= sampling.temperature <= _HOTTEST:
        raise ValueError(f"temperature must lie between 0 and {_HOTTEST}")
    if not 0 <= sampling.top_p <= 1:
        raise ValueError("top_p must lie between 0 and 1")
    if sampling.max_new_tokens == 0:
        raise ValueError("max_new_tokens must be positive")


def random_numbers(seed: int, count: int) -> npt.NDArray[np.float64]:
    """One number in [0, 1) for each token of a turn: a turn's choices depend on its seed alone, not on its batch."""
    return np.random.default_rng(seed).random(count)


def choose(logits: torch.Tensor, temperature: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Token ids [rows] from `logits` float32 [rows, vocabulary] (banned ones −inf) and three float64 [rows].

    Temperature 0 takes the most probable token; otherwise the inverse of the cumulated probabilities at `uniform`.
    Of the tokens sorted by probability the first ones are kept whose sum reaches `top_p` (0 and 1: all).
    """
    greedy = logits.argmax(dim=-1)
    if not bool((temperature > 0).any()):
        return greedy
    scale = torch.where(temperature > 0, temperature, 1.0)
    # Doubles: over a vocabulary of 150,000 the float32 sum would be off by more than a rare token's share.
    probabilities = torch.softmax(logits.double() / scale[:, None], dim=-1)
    nucleus = ((top_p > 0) & (top_p < 1)).nonzero()[:, 0]
    if len(nucleus):
        probabilities[nucleus] = _top(probabilities[nucleus], top_p[nucleus])
    cumulated = probabilities.cumsum(dim=-1)
    # right=True: the first token whose sum lies *above* the number, so never one of probability zero.
    sampled = torch.searchsorted(cumulated, (uniform * cumulated[:, -1])[:, None], right=True)[:, 0]
    return torch.where(temperature > 0, sampled.clamp_max(logits.shape[-1] - 1), greedy)


def _top(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero but for the most probable tokens that together reach `top_p`."""
    ordered, order = probabilities.sort(dim=-1, descending=True)
    kept = (ordered.cumsum(dim=-1) - ordered) < top_p[:, None]
    return torch.zeros_like(probabilities).scatter(-1, order, ordered * kept)
