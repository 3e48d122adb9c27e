"""Advantages of a group of rollouts: how much better than its siblings each one was (GRPO, arXiv 2402.03300). Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Rewards this near to each other are equal: what is left is rounding.
_EQUAL = 1e-6


@dataclass(frozen=True)
class Scale:
    """Divides a group's advantages by the deviation of its rewards plus `floor`: without it rewards that hardly differ
    would be blown up to those that differ by a verdict.
    """

    floor: float

    def of(self, rewards: Sequence[float]) -> float:
        mean = sum(rewards) / len(rewards)
        return math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards)) + self.floor


def advantages(rewards: Sequence[float], scale: Scale | None = None) -> list[float] | None:
    """Reward minus the group's mean, divided by `scale` where there is one; None when the rewards are all equal: such a
    group has nothing to teach.

    Without a scale (Dr. GRPO, and AgentIAD as run) prompts weigh by how far rewards lie apart.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if max(map(abs, centred)) < _EQUAL:
        return None
    return centred if scale is None else [value / scale.of(rewards) for value in centred]


def tail_advantages(rewards: Sequence[float], rights: Sequence[bool], scale: Scale | None = None) -> list[float]:
    """Of what was said after the verdict: only rewards that it could still change (`rewards`), against the mean of
    those whose verdict was right as well. After a wrong verdict there is nothing to gain or to lose: 0.
    """
    reached = [reward for reward, right in zip(rewards, rights, strict=True) if right]
    found = iter((advantages(reached, scale) if reached else None) or [0.0] * len(reached))
    return [next(found) if right else 0.0 for right in rights]
