"""Where the pretext sees marks."""

import torch

from services.trainer.pretext import PretextHeads, targets


def test_the_token_under_a_mark_has_its_label_and_its_box() -> None:
    grids = torch.tensor([[1, 8, 8], [1, 8, 4]])  # 4 x 4 tokens, then 4 x 2
    marks = torch.tensor([[0, 2, 0.3, 0.55, 0.45, 0.7], [1, 0, 0.0, 0.0, 0.5, 0.25]])
    labels, boxes = targets(grids, 2, marks)
    assert labels.shape == (16 + 8,)
    assert labels.nonzero().flatten().tolist() == [2 * 4 + 1, 16]
    assert labels[9] == 3
    assert torch.allclose(boxes[9], marks[0, 2:])


def test_a_token_that_is_only_touched_is_left_out() -> None:
    labels, _ = targets(torch.tensor([[1, 8, 8]]), 2, torch.tensor([[0, 0, 0.0, 0.0, 0.29, 0.25]]))
    assert labels[:3].tolist() == [1, -100, 0]


def test_images_without_marks_have_a_loss_too() -> None:
    heads = PretextHeads(8, 2)
    loss = heads.loss(torch.randn(16, 8), torch.tensor([[1, 8, 8]]), 2, torch.zeros(0, 6), torch.randn(101, 8), 0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
