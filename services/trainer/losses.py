"""The one loss path: weighted log-probabilities of tokens. SFT and RL differ in the weights alone. Pure.

A policy-gradient objective (clipped ratio, importance weight, KL) has the gradient of a weighted sum of
log-probabilities whose weights are fixed: `policy_weights` computes these.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


@dataclass(frozen=True)
class Coordinates:
    """Tokens that stand for numbers in [0, 1]. ids int64 [c], ascending; index int64 [vocabulary], -1: none."""

    ids: Tensor
    index: Tensor

    @classmethod
    def of(cls, ids: list[int], vocabulary: int) -> "Coordinates":
        index = torch.full((vocabulary,), -1, dtype=torch.long)
        index[torch.tensor(ids)] = torch.arange(len(ids))
        return cls(torch.tensor(ids), index)


def token_log_probabilities(
    logits: Tensor, targets: Tensor, coordinates: Coordinates | None = None, sigma: float = 0.0
) -> Tensor:
    """[n] from logits [n, vocabulary] and targets int64 [n].

    With `coordinates` and sigma > 0 (in units of the coordinate) a coordinate's target is a Gaussian over its
    neighbours: a near miss costs less than a far one.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    chosen = log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if coordinates is not None and sigma > 0:
        index = coordinates.index[targets]
        rows = (index >= 0).nonzero().squeeze(1)
        if len(rows):
            soft = smoothed(index[rows], len(coordinates.ids), sigma)
            near = log_probabilities[rows][:, coordinates.ids]
            chosen = chosen.index_put((rows,), (soft * near).sum(1))
    return chosen


def weighted_loss(log_probabilities: Tensor, weights: Tensor, normaliser: Tensor | float | None = None) -> Tensor:
    """-sum(weight x log-probability) / normaliser, a scalar. Both [n], of any sign; None: the sum of |weight|."""
    if normaliser is None:
        normaliser = weights.abs().sum().clamp(min=1e-6)
    return -(log_probabilities * weights).sum() / normaliser


@dataclass(frozen=True)
class Clipping:
    """How far one batch may move the policy, and how far it may have moved since the batch was sampled."""

    low: float  # a ratio below 1 - low gains nothing by falling further
    high: float  # a ratio above 1 + high gains nothing by rising further
    importance: float  # upper bound of the importance weight of a token (truncated importance sampling)


@dataclass(frozen=True)
class PolicyWeights:
    weights: Tensor  # [n], for `weighted_loss`
    clipped: Tensor  # bool [n]: the ratio's bound took the token's gradient away
    truncated: Tensor  # bool [n]: the importance weight was cut


def policy_weights(
    current: Tensor,
    proximal: Tensor,
    behaviour: Tensor,
    advantages: Tensor,
    clipping: Clipping,
    reference: Tensor | None = None,
    kl: float = 0.0,
) -> PolicyWeights:
    """The weights whose `weighted_loss` has the gradient of GRPO's clipped objective, decoupled as in AReaL: the ratio
    is taken against the policy at the start of the batch (`proximal`), and each token weighs min(p_proximal /
    p_behaviour, importance), where behaviour is the version that sampled it.

    All [n], log-probabilities without gradient. `kl` > 0 adds kl x the estimator exp(d) - d - 1, d = reference -
    current (Schulman's k3).
    """
    ratio = (current - proximal).exp()
    clipped = ((advantages > 0) & (ratio > 1 + clipping.high)) | ((advantages < 0) & (ratio < 1 - clipping.low))
    importance = (proximal - behaviour).exp()
    truncated = importance > clipping.importance
    weights = torch.where(clipped, 0.0, importance.clamp(max=clipping.importance) * ratio * advantages)
    if kl > 0:
        assert reference is not None
        weights = weights - kl * (1 - (reference - current).exp())
    return PolicyWeights(weights, clipped, truncated)


def smoothed(index: Tensor, steps: int, sigma: float) -> Tensor:
    """Gaussian targets [n, steps] around `index` [n]; `steps` bins span [0, 1]; each row sums to one."""
    bins = torch.arange(steps, device=index.device)
    distance = (bins[None, :] - index[:, None]) / ((steps - 1) * sigma)
    weights = torch.exp(-0.5 * distance.square())
    return weights / weights.sum(1, keepdim=True)
