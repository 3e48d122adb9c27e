"""How tokens are chosen inside vLLM: by our own sampler, so that a seed means the same tokens in every engine.

vLLM's own seeded sampling depends on how a prompt was cut into chunks, and on CPUs it breaks the engine when one is
(0.32: "CPU Generator does not use offset"). vLLM is told to take the most probable token, and this leaves it just one.
Log-probabilities are taken before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

from services.policy import sampling as sampler


@dataclass(frozen=True)
class _Seeded:
    """`ids`: the tokens chosen so far; vLLM appends to them."""

    temperature: float
    top_p: float
    uniform: npt.NDArray[np.float64]
    ids: list[int]


class SeededSampler(LogitsProcessor):  # type: ignore[misc]  # vLLM is not installed where types are checked
    """Wants `banned_ids` in the engine's additional_config, and `seeded_args` as the extra_args of each request."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self._banned = torch.tensor(vllm_config.additional_config["banned_ids"], dtype=torch.long, device=device)
        self._rows: dict[int, _Seeded] = {}

    def is_argmax_invariant(self) -> bool:
        """It decides what the most probable token is."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Called by vLLM before each step."""
        process_dict_updates(self._rows, batch_update, _seeded)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """[rows, vocabulary]: all but the chosen token at −inf."""
        logits[:, self._banned] = -torch.inf
        wishes = torch.zeros(len(logits), 3, dtype=torch.float64)  # greedy, where vLLM only warms up
        for index, row in self._rows.items():
            # Beyond the end: a token that vLLM computes ahead of the last one and throws away.
            number = row.uniform[min(len(row.ids), len(row.uniform) - 1)]
            wishes[index] = torch.tensor([row.temperature, row.top_p, number], dtype=torch.float64)
        chosen = sampler.choose(logits, *wishes.to(logits.device).unbind(1))
        return torch.full_like(logits, -torch.inf).scatter_(1, chosen[:, None], 0.0)


def seeded_args(temperature: float, top_p: float, seed: int) -> dict[str, Any]:
    """The extra_args of a request."""
    return {"temperature": temperature, "top_p": top_p, "seed": seed}


def _seeded(params: SamplingParams, _: list[int] | None, ids: list[int]) -> _Seeded | None:
    if not params.extra_args:
        return None
    uniform = sampler.random_numbers(params.extra_args["seed"], params.max_tokens)
    return _Seeded(params.extra_args["temperature"], params.extra_args["top_p"], uniform, ids)
