"""The vision pretext: what lies at each visual token, and its box, through heads that are thrown away.

It teaches the tower directly where it would else have to wait for the language model to ask.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

_NOTHING, _IGNORED = 0, -100
# Of a token's area (or of the mark's, if that is smaller) that a mark must cover to be the token's answer; and to be
# left out of the loss.
_COVERED, _TOUCHED = 0.35, 0.08
# One token in forty holds a mark.
_NOTHING_WEIGHT = 0.15
_BOX_WEIGHT = 2.0


class PretextHeads(nn.Module):
    """`labels`: how many kinds of marks there are."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, labels + 1)
        self.box = nn.Linear(width, 4)
        weight = torch.ones(labels + 1)
        weight[_NOTHING] = _NOTHING_WEIGHT
        self.register_buffer("weight", weight)

    def loss(self, features: Tensor, grids: Tensor, merge: int, marks: Tensor) -> Tensor:
        """features [tokens of all images, width]; grids [images, 3] in patches; marks [m, 6] (image, label, box)."""
        labels, boxes = targets(grids, merge, marks)
        normed = self.norm(features)
        assert isinstance(self.weight, Tensor)
        loss = F.cross_entropy(self.kind(normed), labels, self.weight, ignore_index=_IGNORED)
        found = labels > 0
        if found.any():
            loss = loss + _BOX_WEIGHT * F.smooth_l1_loss(self.box(normed[found]), boxes[found], beta=0.05)
        return loss


def targets(grids: Tensor, merge: int, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Label int64 [tokens] (0: nothing, -100: don't care, else 1 + the mark's label) and box [tokens, 4].

    A box is given as (centre - token's centre, size) in units of four tokens: near zero, of order one.
    """
    all_labels, all_boxes = [], []
    for image, (_, height, width) in enumerate((grids // merge).tolist()):
        labels = torch.zeros(height, width, dtype=torch.long)
        boxes = torch.zeros(height, width, 4)
        for _, label, x1, y1, x2, y2 in marks[marks[:, 0] == image].tolist():
            x1, x2, y1, y2 = x1 * width, x2 * width, y1 * height, y2 * height
            columns, rows = torch.arange(width), torch.arange(height)
            across = (torch.clamp(columns + 1, max=x2) - torch.clamp(columns, min=x1)).clamp(min=0)
            down = (torch.clamp(rows + 1, max=y2) - torch.clamp(rows, min=y1)).clamp(min=0)
            share = down[:, None] * across[None, :] / min(1.0, max((x2 - x1) * (y2 - y1), 1e-6))
            covered = (share >= _COVERED) | (share == share.max())
            labels[(share >= _TOUCHED) & ~covered & (labels == _NOTHING)] = _IGNORED
            labels[covered] = int(label) + 1
            x, y = torch.meshgrid(columns + 0.5, rows + 0.5, indexing="xy")
            size = torch.tensor([x2 - x1, y2 - y1]).expand(height, width, 2)
            offset = torch.stack([(x1 + x2) / 2 - x, (y1 + y2) / 2 - y], dim=-1)
            boxes[covered] = (torch.cat([offset, size], dim=-1) / 4)[covered]
        all_labels.append(labels.flatten())
        all_boxes.append(boxes.flatten(0, 1))
    return torch.cat(all_labels), torch.cat(all_boxes)
