"""Where the pretext sees marks."""

import torch

from services.trainer.pretext import PretextHeads, targets


def test_the_token_under_a_mark_has_its_label() -> None:
    grids = torch.tensor([[1, 8, 8], [1, 8, 4]])  # 4 x 4 tokens, then 4 x 2
    marks = torch.tensor([[0, 2, 0.3, 0.55, 0.45, 0.7], [1, 0, 0.0, 0.0, 0.5, 0.25]])
    here = targets(grids, 2, marks).here
    assert here.shape == (16 + 8,)
    assert here.nonzero().flatten().tolist() == [2 * 4 + 1, 16]
    assert here[9] == 3


def test_a_token_that_is_only_touched_is_left_out() -> None:
    here = targets(torch.tensor([[1, 8, 8]]), 2, torch.tensor([[0, 0, 0.0, 0.0, 0.29, 0.25]])).here
    assert here[:3].tolist() == [1, -100, 0]


def test_every_token_of_an_image_tells_its_first_mark() -> None:
    marks = torch.tensor([[1, 2, 0.1, 0.2, 0.3, 0.4], [1, 0, 0.6, 0.6, 0.8, 0.8]])
    truth = targets(torch.tensor([[1, 4, 4], [1, 4, 4]]), 2, marks)
    assert truth.anywhere.tolist() == [0] * 4 + [3] * 4
    assert torch.allclose(truth.boxes[4:], marks[0, 2:].expand(4, 4))


def test_only_tokens_on_the_first_mark_lie_on_the_main_one() -> None:
    marks = torch.tensor([[0, 2, 0.0, 0.0, 0.5, 0.5], [0, 0, 0.5, 0.5, 1.0, 1.0]])
    truth = targets(torch.tensor([[1, 4, 4]]), 2, marks)
    assert truth.here.tolist() == [3, 0, 0, 1]
    assert truth.on_main.tolist() == [True, False, False, False]


def test_images_without_marks_have_a_loss_too() -> None:
    heads = PretextHeads(8, 2)
    loss = heads.loss(torch.randn(16, 8), torch.tensor([[1, 8, 8]]), 2, torch.zeros(0, 6), torch.randn(101, 8), 0.02)
    loss.backward()  # type: ignore[no-untyped-call]
    assert torch.isfinite(loss)
