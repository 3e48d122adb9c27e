"""The vision pretext, through heads that are thrown away: what lies at each visual token; and, told by every token
alike, what the image shows and where.

It teaches the tower directly where it would else have to wait for the language model to ask. A box is told as a reply
tells it: in the image's own coordinates, by the coordinates' own embeddings. And because every token knows the answer
for the whole image, the language model may look anywhere to read it: finding one token of 36 by its content is what
small models learn last.
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
        self.here = nn.Linear(width, labels + 1)
        self.anywhere = nn.Linear(width, labels + 1)
        self.box = nn.Linear(width, 4 * width)
        weight = torch.ones(labels + 1)
        weight[_NOTHING] = _NOTHING_WEIGHT
        self.register_buffer("weight", weight)

    def loss(
        self, features: Tensor, grids: Tensor, merge: int, marks: Tensor, embeddings: Tensor | None, sigma: float
    ) -> Tensor:
        """features [tokens of all images, width]; grids [images, 3] in patches; marks [m, 6] (image, label, box), an
        image's main one first; embeddings [_STEPS, width] of the coordinates, where the checkpoint has them; sigma as
        in the policy's loss.
        """
        here, anywhere, boxes = targets(grids, merge, marks)
        normed = self.norm(features)
        assert isinstance(self.weight, Tensor)
        loss = F.cross_entropy(self.here(normed), here, self.weight, ignore_index=_IGNORED)
        loss = loss + F.cross_entropy(self.anywhere(normed), anywhere)
        found = anywhere > 0
        if embeddings is not None and found.any():
            said = self.box(normed[found]).view(-1, 4, embeddings.shape[1]) @ embeddings.T
            bins = (boxes[found] * (_STEPS - 1)).round().long()
            wanted = smoothed(bins.flatten(), _STEPS, sigma).view(-1, 4, _STEPS)
            loss = loss - (wanted * F.log_softmax(said, dim=-1)).sum(-1).mean()
        return loss


def targets(grids: Tensor, merge: int, marks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each token: its own label and that of its image's main mark, int64 [tokens] (0: nothing, -100: don't care,
    else 1 + the mark's label), and the main mark's box [tokens, 4].
    """
    all_here, all_anywhere, all_boxes = [], [], []
    for image, (_, height, width) in enumerate((grids // merge).tolist()):
        here = torch.zeros(height, width, dtype=torch.long)
        mine = marks[marks[:, 0] == image].tolist()
        for _, label, *box in mine:
            share = _shares(box, height, width)
            covered = (share >= _COVERED) | (share == share.max())
            here[(share >= _TOUCHED) & ~covered & (here == _NOTHING)] = _IGNORED
            here[covered] = int(label) + 1
        all_here.append(here.flatten())
        all_anywhere.append(torch.full((height * width,), int(mine[0][1]) + 1 if mine else _NOTHING))
        all_boxes.append(torch.tensor(mine[0][2:] if mine else [0.0] * 4).expand(height * width, 4))
    return torch.cat(all_here), torch.cat(all_anywhere), torch.cat(all_boxes)


def _shares(box: list[float], height: int, width: int) -> Tensor:
    """How much of each token [height, width] (or of the box, if that is smaller) the box covers."""
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    columns, rows = torch.arange(width), torch.arange(height)
    across = (torch.clamp(columns + 1, max=x2) - torch.clamp(columns, min=x1)).clamp(min=0)
    down = (torch.clamp(rows + 1, max=y2) - torch.clamp(rows, min=y1)).clamp(min=0)
    return down[:, None] * across[None, :] / min(1.0, max((x2 - x1) * (y2 - y1), 1e-6))
