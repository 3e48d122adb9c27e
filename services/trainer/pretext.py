"""The vision pretext, through heads that are thrown away: what lies at each visual token; and, told by every token
alike, what the image shows and where.

It teaches the tower directly where it would else have to wait for the language model to ask. A box is told as a reply
tells it: in the image's own coordinates, by the coordinates' own embeddings; the tokens that lie on the mark learn it
first and the others from them. Once every token knows the answer for the whole image, the language model may look
anywhere to read it: finding one token of 36 by its content is what small models learn last.
"""

from dataclasses import dataclass

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
_EVERYWHERE_WEIGHT = 0.5  # of the box told by every token, against the box told by those on the mark


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
        truth = targets(grids, merge, marks)
        normed = self.norm(features)
        assert isinstance(self.weight, Tensor)
        loss = F.cross_entropy(self.here(normed), truth.here, self.weight, ignore_index=_IGNORED)
        loss = loss + F.cross_entropy(self.anywhere(normed), truth.anywhere)
        if embeddings is not None and truth.on_main.any():
            loss = loss + self._box_loss(normed, truth.boxes, truth.on_main, embeddings, sigma)
            everywhere = self._box_loss(normed, truth.boxes, truth.anywhere > 0, embeddings, sigma)
            loss = loss + _EVERYWHERE_WEIGHT * everywhere
        return loss

    def _box_loss(self, normed: Tensor, boxes: Tensor, tokens: Tensor, embeddings: Tensor, sigma: float) -> Tensor:
        said = self.box(normed[tokens]).view(-1, 4, embeddings.shape[1]) @ embeddings.T
        bins = (boxes[tokens] * (_STEPS - 1)).round().long()
        wanted = smoothed(bins.flatten(), _STEPS, sigma).view(-1, 4, _STEPS)
        return -(wanted * F.log_softmax(said, dim=-1)).sum(-1).mean()


@dataclass(frozen=True)
class Targets:
    """Of each token of all images, in their order."""

    here: Tensor  # int64: 0 nothing, -100 don't care, else 1 + the label of the mark that it lies on
    anywhere: Tensor  # int64: 0 or 1 + the label of its image's main mark
    boxes: Tensor  # [tokens, 4] of the main mark
    on_main: Tensor  # bool: it lies on the main mark


def targets(grids: Tensor, merge: int, marks: Tensor) -> Targets:
    """grids [images, 3] in patches; marks [m, 6] as in `PretextHeads.loss`."""
    each = []
    for image, (_, height, width) in enumerate((grids // merge).tolist()):
        here = torch.zeros(height, width, dtype=torch.long)
        on_main = torch.zeros(height, width, dtype=torch.bool)
        mine = marks[marks[:, 0] == image].tolist()
        for number, (_, label, *box) in enumerate(mine):
            share = _shares(box, height, width)
            covered = (share >= _COVERED) | (share == share.max())
            here[(share >= _TOUCHED) & ~covered & (here == _NOTHING)] = _IGNORED
            here[covered] = int(label) + 1
            if number == 0:
                on_main = covered
        tokens = height * width
        anywhere = torch.full((tokens,), int(mine[0][1]) + 1 if mine else _NOTHING)
        boxes = torch.tensor(mine[0][2:] if mine else [0.0] * 4).expand(tokens, 4)
        each.append((here.flatten(), anywhere, boxes, on_main.flatten()))
    return Targets(*(torch.cat(parts) for parts in zip(*each, strict=True)))


def _shares(box: list[float], height: int, width: int) -> Tensor:
    """How much of each token [height, width] (or of the box, if that is smaller) the box covers."""
    x1, y1, x2, y2 = box[0] * width, box[1] * height, box[2] * width, box[3] * height
    columns, rows = torch.arange(width), torch.arange(height)
    across = (torch.clamp(columns + 1, max=x2) - torch.clamp(columns, min=x1)).clamp(min=0)
    down = (torch.clamp(rows + 1, max=y2) - torch.clamp(rows, min=y1)).clamp(min=0)
    return down[:, None] * across[None, :] / min(1.0, max((x2 - x1) * (y2 - y1), 1e-6))
