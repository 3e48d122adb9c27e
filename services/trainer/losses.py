"""The one loss path: per-token weighted cross-entropy. SFT and RL differ in the weights alone. Pure."""

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


def weighted_cross_entropy(
    logits: Tensor, targets: Tensor, weights: Tensor, coordinates: Coordinates | None = None, sigma: float = 0.0
) -> Tensor:
    """Sum of weight x cross-entropy over the sum of |weight|; a scalar.

    logits [n, vocabulary]; targets int64 [n]; weights [n], of any sign. With `coordinates` and sigma > 0 (in units of
    the coordinate) a coordinate's target is a Gaussian over its neighbours: a near miss costs less than a far one.
    """
    log_probabilities = F.log_softmax(logits.float(), dim=-1)
    losses = -log_probabilities.gather(1, targets[:, None]).squeeze(1)
    if coordinates is not None and sigma > 0:
        index = coordinates.index[targets]
        rows = (index >= 0).nonzero().squeeze(1)
        if len(rows):
            soft = smoothed(index[rows], len(coordinates.ids), sigma)
            near = log_probabilities[rows][:, coordinates.ids]
            losses = losses.index_put((rows,), -(soft * near).sum(1))
    return (losses * weights).sum() / weights.abs().sum().clamp(min=1e-6)


def smoothed(index: Tensor, steps: int, sigma: float) -> Tensor:
    """Gaussian targets [n, steps] around `index` [n]; `steps` bins span [0, 1]; each row sums to one."""
    bins = torch.arange(steps, device=index.device)
    distance = (bins[None, :] - index[:, None]) / ((steps - 1) * sigma)
    weights = torch.exp(-0.5 * distance.square())
    return weights / weights.sum(1, keepdim=True)
