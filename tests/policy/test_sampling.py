from __future__ import annotations

import math

import pytest
import torch

from agentiad.v1 import trajectory_pb2 as pb
from services.policy.sampling import check, choose, random_numbers


def one(probabilities: list[float], uniform: float, temperature: float = 1.0, top_p: float = 0.0) -> int:
    logits = torch.tensor([probabilities]).log()
    wish = (torch.tensor([value], dtype=torch.float64) for value in (temperature, top_p, uniform))
    return int(choose(logits, *wish)[0])


@pytest.mark.parametrize(("uniform", "token"), [(0.0, 0), (0.19, 0), (0.21, 1), (0.69, 1), (0.71, 3), (0.999999, 3)])
def test_sampling_inverts_the_cumulated_probabilities(uniform: float, token: int) -> None:
    assert one([0.2, 0.5, 0.0, 0.3], uniform) == token


def test_a_token_of_probability_zero_is_never_chosen() -> None:
    for uniform in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        assert one([0.0, 0.5, 0.0, 0.5, 0.0], uniform) in (1, 3)


@pytest.mark.parametrize(
    ("top_p", "possible"),
    [(0.4, {1}), (0.5, {1}), (0.51, {1, 3}), (0.85, {0, 1, 3}), (1, {0, 1, 2, 3}), (0, {0, 1, 2, 3})],
)
def test_top_p_keeps_the_most_probable_that_reach_it(top_p: float, possible: set[int]) -> None:
    chosen = {one([0.15, 0.5, 0.05, 0.3], uniform / 100, top_p=top_p) for uniform in range(100)}
    assert chosen == possible


def test_temperature_sharpens_and_flattens() -> None:
    # p ∝ p^(1/T): at T = 0.5 the first token's share falls from 0.2 to 0.04 / 0.68.
    assert one([0.2, 0.8], 0.1) == 0
    assert one([0.2, 0.8], 0.1, temperature=0.5) == 1
    assert one([0.2, 0.8], 0.4, temperature=100) == 0


def test_temperature_zero_takes_the_most_probable() -> None:
    assert {one([0.3, 0.4, 0.3], uniform / 10, temperature=0) for uniform in range(10)} == {1}


def test_rows_do_not_touch_each_other() -> None:
    logits = torch.randn(6, 50)
    temperature = torch.tensor([0, 1, 0.5, 2, 1, 1], dtype=torch.float64)
    top_p = torch.tensor([0, 0.9, 0, 0.5, 1, 0.3], dtype=torch.float64)
    uniform = torch.rand(6, dtype=torch.float64)
    together = choose(logits, temperature, top_p, uniform)
    for row in range(6):
        part = slice(row, row + 1)
        assert choose(logits[part], temperature[part], top_p[part], uniform[part]) == together[row]


def test_frequencies_follow_the_probabilities() -> None:
    expected = torch.tensor([0.1, 0.2, 0.3, 0.4])
    count = 4000
    logits = expected.log().expand(count, -1)
    ones = torch.ones(count, dtype=torch.float64)
    chosen = choose(logits, ones, ones, torch.from_numpy(random_numbers(0, count)))
    # Four standard deviations of a share of 4,000 draws.
    assert torch.bincount(chosen, minlength=4) / count == pytest.approx(expected, abs=4 * 0.5 / math.sqrt(count))


def test_random_numbers_are_the_seeds_alone() -> None:
    assert random_numbers(2**64 - 1, 5).tolist() == random_numbers(2**64 - 1, 9)[:5].tolist()
    assert random_numbers(1, 5).tolist() != random_numbers(2, 5).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        pb.Sampling(max_new_tokens=0),
        pb.Sampling(max_new_tokens=1, temperature=-0.1),
        pb.Sampling(max_new_tokens=1, temperature=math.inf),
        pb.Sampling(max_new_tokens=1, temperature=math.nan),
        pb.Sampling(max_new_tokens=1, top_p=1.01),
        pb.Sampling(max_new_tokens=1, top_p=-0.01),
        pb.Sampling(max_new_tokens=1, top_p=math.nan),
    ],
)
def test_wishes_outside_their_range_are_refused(sampling: pb.Sampling) -> None:
    with pytest.raises(ValueError, match="must"):
        check(sampling)
