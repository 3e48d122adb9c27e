"""Advantages of a group of rollouts: how much better than its siblings each one was (GRPO, arXiv 2402.03300). Pure."""

from collections.abc import Sequence

# Rewards this near to each other are equal: what is left is rounding.
_EQUAL = 1e-6
# Keeps a group of almost equal rewards from exploding under the division.
_FLOOR = 1e-2


def advantages(rewards: Sequence[float], *, divide_by_std: bool) -> list[float] | None:
    """Reward minus the group's mean, divided by the group's standard deviation where asked for; None when the rewards
    are all equal: such a group has nothing to teach.

    Without the division (Dr. GRPO, and AgentIAD as run) hard and easy prompts weigh by how far rewards lie apart.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if max(map(abs, centred)) < _EQUAL:
        return None
    if not divide_by_std:
        return centred
    deviation = (sum(value * value for value in centred) / len(centred)) ** 0.5
    return [value / (deviation + _FLOOR) for value in centred]


def tail_advantages(rewards: Sequence[float], rights: Sequence[bool]) -> list[float]:
    """Of what was said after the verdict: only rewards that it could still change (`rewards`), against the mean of
    those whose verdict was right as well. After a wrong verdict there is nothing to gain or to lose: 0.
    """
    reached = [reward for reward, right in zip(rewards, rights, strict=True) if right]
    mean = sum(reached) / len(reached) if reached else 0.0
    return [reward - mean if right else 0.0 for reward, right in zip(rewards, rights, strict=True)]
