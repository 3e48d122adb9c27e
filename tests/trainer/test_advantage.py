"""How much better than its siblings a rollout was."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.trainer.advantage import Scale, advantages, tail_advantages

SCALE = Scale(0.01)
REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


@given(REWARDS, st.booleans())
def test_they_cancel_out_and_keep_the_order(rewards: list[float], divide: bool) -> None:
    found = advantages(rewards, SCALE if divide else None)
    if found is None:
        assert max(rewards) - min(rewards) < 1e-5
        return
    assert sum(found) == pytest.approx(0, abs=1e-9)
    for one, reward in zip(found, rewards, strict=True):
        for other, sibling in zip(found, rewards, strict=True):
            assert one >= other or reward < sibling
    assert max(found) > 0 > min(found)


@given(REWARDS, st.floats(-5, 5), st.booleans())
def test_what_all_get_teaches_nothing(rewards: list[float], gift: float, divide: bool) -> None:
    found = advantages([reward + gift for reward in [0.0, 1.0, *rewards]], SCALE if divide else None)
    assert found == pytest.approx(advantages([0.0, 1.0, *rewards], SCALE if divide else None), abs=1e-9)


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("reward", [0.0, 0.1, -3.7])
def test_equal_rewards_have_nothing_to_teach(reward: float, divide: bool) -> None:
    # Sums of the same parts in another order differ by rounding.
    assert advantages([reward] * 7 + [reward + 1e-9], SCALE if divide else None) is None


def test_without_the_division_distances_stay_distances() -> None:
    assert advantages([0.0, 1.0, 2.0, 5.0]) == pytest.approx([-2.0, -1.0, 0.0, 3.0])


@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_with_the_division_every_group_weighs_about_alike(scale: float) -> None:
    found = advantages([0.0, 0.0, scale, scale], SCALE)
    assert found == pytest.approx([-1.0, -1.0, 1.0, 1.0], rel=0.2)


def test_almost_equal_rewards_do_not_explode() -> None:
    found = advantages([0.0, 1e-5], SCALE)
    assert found is not None
    assert max(found) < 1e-2


def test_what_follows_a_verdict_is_compared_with_what_follows_other_right_ones() -> None:
    assert tail_advantages([0.5, 0.1, 0.9, 0.3], [True, True, False, True]) == pytest.approx([0.2, -0.2, 0, 0])
    assert tail_advantages([0.5, 0.1], [False, False]) == [0, 0]
