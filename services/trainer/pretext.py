"""The vision pretext: what lies at each visual token, and its box, through heads that are thrown away.

It teaches the tower directly where it would else have to wait for the language model to ask. A box is told as a reply
tells it: in the image's own coordinates, by the coordinates' own embeddings. So a visual token comes to hold, in the
language model's terms, what the model will have to say after it has looked there.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from services.trainer.losses import smoothed

_NOTHING, _IGNORED = 0, -100
# Of a token's area (or of the mark's, if that is smaller) that a mark must cover to be the token's answer; and to be
# left out of the loss.
_COVERED, _TOUCHED = 0.35, 0.08
# One token in forty holds a mark.
_NOTHING_WEIGHT = 0.15
_STEPS = 101  # hundredths, as replies write them


class PretextHeads(nn.Module):
    """`labels`: how many kinds of marks there are."""

    def __init__(self, width: int, labels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.kind = nn.Linear(width, labels + 1)
        self.box = nn.Linear(width, 4 * width)
        weight = torch.ones(labels + 1)
        weight[_NOTHING] = _NOTHING_WEIGHT
        self.register_buffer("weight", weight)

    def loss(
        self, features: Tensor, grids: Tensor, merge: int, marks: Tensor, embeddings: Tensor | None, sigma: float
    ) -> Tensor:
        """features [tokens of all images, width]; grids [images, 3] in patches; marks [m, 6] (image, label, box);
        embeddings [_STEPS, width] of the coordinates, where the checkpoint has them; sigma as in the policy's loss.
        """
        labels, boxes = targets(grids, merge, marks)
        normed = self.norm(features)
        assert isinstance(self.weight, Tensor)
        loss = F.cross_entropy(self.kind(normed), labels, self.weight, ignore_index=_IGNORED)
        found = labels > 0
        if embeddings is not None and found.any():
            said = self.box(normed[found]).view(-1, 4, embeddings.shape[1]) @ embeddings.T
            bins = (boxes[found] * (_STEPS - 1)).round().long()
            wanted = smoothed(bins.flatten(), _STEPS, sigma).view(-1, 4, _STEPS)
            loss = loss - (wanted * F.log_softmax(said, dim=-1)).sum(-1).mean()
        return loss


def targets(grids: Tensor, merge: int, marks: Tensor) -> tuple[Tensor, Tensor]:
    """Label int64 [tokens] (0: nothing, -100: don't care, else 1 + the mark's label) and box [tokens, 4]."""
    all_labels, all_boxes = [], []
    for image, (_, height, width) in enumerate((grids // merge).tolist()):
        labels = torch.zeros(height, width, dtype=torch.long)
        boxes = torch.zeros(height, width, 4)
        for _, label, *box in marks[marks[:, 0] == image].tolist():
            x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
            columns, rows = torch.arange(width), torch.arange(height)
            across = (torch.clamp(columns + 1, max=x2) - torch.clamp(columns, min=x1)).clamp(min=0)
            down = (torch.clamp(rows + 1, max=y2) - torch.clamp(rows, min=y1)).clamp(min=0)
            share = down[:, None] * across[None, :] / min(1.0, max((x2 - x1) * (y2 - y1), 1e-6))
            covered = (share >= _COVERED) | (share == share.max())
            labels[(share >= _TOUCHED) & ~covered & (labels == _NOTHING)] = _IGNORED
            labels[covered] = int(label) + 1
            boxes[covered] = torch.tensor(box)
        all_labels.append(labels.flatten())
        all_boxes.append(boxes.flatten(0, 1))
    return torch.cat(all_labels), torch.cat(all_boxes)
