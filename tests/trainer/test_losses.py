"""The one loss path."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from services.trainer.losses import (
    Clipping,
    Coordinates,
    policy_weights,
    smoothed,
    token_log_probabilities,
    weighted_loss,
)


def make_logits(rows: int = 4, vocabulary: int = 12) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0))


def weighted_cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
    coordinates: Coordinates | None = None,
    sigma: float = 0.0,
) -> torch.Tensor:
    return weighted_loss(token_log_probabilities(logits, targets, coordinates, sigma), weights)


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


CLIPPING = Clipping(low=0.2, high=0.28, importance=2.0)


def make_tokens(count: int = 400) -> dict[str, torch.Tensor]:
    """Log-probabilities of tokens under four policies not far from each other, and advantages of both signs."""
    random = torch.Generator().manual_seed(1)
    current = -torch.rand(count, generator=random) * 3
    near = {
        name: (current + torch.randn(count, generator=random) * 0.4).clamp(max=0)
        for name in ("proximal", "behaviour", "reference")
    }
    return {"current": current, **near, "advantages": torch.randn(count, generator=random)}


def test_the_weights_have_the_gradient_of_the_clipped_objective() -> None:
    tokens, kl = make_tokens(), 0.1
    current = tokens["current"].clone().requires_grad_()
    ratio = (current - tokens["proximal"]).exp()
    bounded = ratio.clamp(1 - CLIPPING.low, 1 + CLIPPING.high)
    importance = (tokens["proximal"] - tokens["behaviour"]).exp().clamp(max=CLIPPING.importance)
    surrogate = importance * torch.minimum(ratio * tokens["advantages"], bounded * tokens["advantages"])
    distance = tokens["reference"] - current
    (kl * (distance.exp() - distance - 1) - surrogate).mean().backward()

    ours = tokens["current"].clone().requires_grad_()
    found = policy_weights(**tokens, clipping=CLIPPING, kl=kl)
    weighted_loss(ours, found.weights, len(ours)).backward()
    assert ours.grad is not None
    assert current.grad is not None
    torch.testing.assert_close(ours.grad, current.grad)
    assert 0 < found.clipped.float().mean() < 1
    assert 0 < found.truncated.float().mean() < 1


def test_on_policy_a_tokens_weight_is_its_advantage() -> None:
    tokens = make_tokens()
    same = tokens["current"]
    found = policy_weights(same, same, same, tokens["advantages"], CLIPPING, same, kl=0.1)
    torch.testing.assert_close(found.weights, tokens["advantages"])
    assert not found.clipped.any()
