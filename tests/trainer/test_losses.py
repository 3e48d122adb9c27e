"""The one loss path."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from services.trainer.losses import Coordinates, smoothed, weighted_cross_entropy


def make_logits(rows: int = 4, vocabulary: int = 12) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def test_equal_weights_give_plain_cross_entropy() -> None:
    logits, targets = make_logits(), torch.tensor([1, 5, 0, 11])
    loss = weighted_cross_entropy(logits, targets, torch.full((4,), 3.0))
    assert loss.item() == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-6)


def test_a_token_of_weight_zero_has_no_gradient() -> None:
    logits = make_logits().requires_grad_()
    weighted_cross_entropy(logits, torch.tensor([1, 5, 0, 11]), torch.tensor([1.0, 0.0, 2.0, 0.0])).backward()
    assert logits.grad is not None
    assert [bool(row.any()) for row in logits.grad] == [True, False, True, False]


def test_a_negative_weight_pushes_away() -> None:
    logits = make_logits(1).requires_grad_()
    weighted_cross_entropy(logits, torch.tensor([3]), torch.tensor([-1.0])).backward()
    assert logits.grad is not None
    assert logits.grad[0, 3] > 0


def test_no_weight_at_all_is_a_loss_of_zero() -> None:
    assert weighted_cross_entropy(make_logits(), torch.zeros(4, dtype=torch.long), torch.zeros(4)).item() == 0.0


def test_a_near_coordinate_costs_less_than_a_far_one_and_other_tokens_are_untouched() -> None:
    coordinates = Coordinates.of(list(range(2, 12)), 12)
    targets, weights = torch.tensor([6]), torch.ones(1)

    def loss(guess: int, sigma: float) -> float:
        logits = torch.zeros(1, 12)
        logits[0, guess] = 8.0
        return weighted_cross_entropy(logits, targets, weights, coordinates, sigma).item()

    assert loss(6, 0.1) < loss(7, 0.1) < loss(11, 0.1)
    assert loss(7, 0.0) == pytest.approx(loss(11, 0.0))
    word = torch.tensor([0])
    assert weighted_cross_entropy(make_logits(1), word, weights, coordinates, 0.1).item() == pytest.approx(
        weighted_cross_entropy(make_logits(1), word, weights).item()
    )


def test_smoothed_targets_are_distributions_around_their_bin() -> None:
    soft = smoothed(torch.tensor([0, 50, 100]), 101, 0.02)
    assert torch.allclose(soft.sum(1), torch.ones(3))
    assert soft.argmax(1).tolist() == [0, 50, 100]
    assert soft[1, 52] == pytest.approx(soft[1, 50].item() * 0.6065, rel=1e-3)  # one sigma
