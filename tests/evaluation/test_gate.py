from __future__ import annotations

import numpy as np
import pytest

from services.evaluation.gate import Comparison, compare

MARGIN = 0.02


def make_comparison(
    anomalous: tuple[int, int, int], normal: tuple[int, int, int], margin: float = MARGIN
) -> Comparison:
    """Of each label: parts that only the candidate gets right, that only the live version does, that both do."""
    truth, live, candidate = [], [], []
    for label, (gained, lost, both) in ((True, anomalous), (False, normal)):
        truth += [label] * (gained + lost + both)
        live += [not label] * gained + [label] * (lost + both)
        candidate += [label] * gained + [not label] * lost + [label] * both
    return compare(truth, live, candidate, margin)


def accepted_share(per_label: int, gains: float, losses: float, sets: int = 400) -> float:
    """Of sets of parts, each of which the candidate alone gets right with probability `gains`, and so on."""
    random = np.random.default_rng(1)
    shares = [gains, losses, 1 - gains - losses]
    draws = random.multinomial(per_label, shares, (sets, 2))
    decided: dict[bytes, bool] = {}
    for draw in draws:
        if draw.tobytes() not in decided:
            decided[draw.tobytes()] = make_comparison(tuple(draw[0]), tuple(draw[1])).not_worse
    return sum(decided[draw.tobytes()] for draw in draws) / sets


def test_accuracies_their_difference_and_the_parts_that_differ() -> None:
    # Anomalous: live 6 of 10, candidate 9 of 10. Normal: live 20 of 20, candidate 18 of 20.
    found = make_comparison((4, 1, 5), (0, 2, 18))
    assert found.parts == 30
    assert found.live == pytest.approx((0.6 + 1.0) / 2)
    assert found.candidate == pytest.approx((0.9 + 0.9) / 2)
    assert found.difference == pytest.approx(0.1)
    assert (found.gained, found.lost) == (4, 3)


def test_the_interval_is_the_normal_one_where_parts_are_many() -> None:
    # A part's change has the variance .05 - .01² among the anomalous, .04 - .02² among the normal.
    found = make_comparison((60, 40, 1900), (60, 20, 1920))
    half = 1.96 * np.sqrt((0.0499 + 0.0396) / 2000) / 2
    assert found.difference == pytest.approx(0.015)
    assert found.low == pytest.approx(0.015 - half, abs=3e-4)
    assert found.high == pytest.approx(0.015 + half, abs=3e-4)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    # 2 · (1 + 5) / 2⁵; 2 · (1 + 10 + 45) / 2¹⁰; as often better as worse; no part to tell by.
    [(1, 4, 0.375), (2, 8, 112 / 1024), (8, 2, 112 / 1024), (3, 3, 1.0), (0, 0, 1.0)],
)
def test_mcnemars_exact_p(gained: int, lost: int, p: float) -> None:
    assert make_comparison((gained, 0, 5), (0, lost, 5)).p_value == pytest.approx(p)


def test_the_same_verdicts_give_the_same_interval() -> None:
    assert make_comparison((9, 7, 280), (3, 5, 290)) == make_comparison((9, 7, 280), (3, 5, 290))


def test_a_label_counts_by_its_share_and_not_by_its_parts() -> None:
    """Three of 30 anomalous parts lost is a loss of 0.05, however many normal parts there are."""
    found = make_comparison((0, 3, 27), (0, 0, 3000))
    assert found.difference == pytest.approx(-0.05)
    assert not found.not_worse


def test_clearly_worse_is_refused_and_clearly_better_accepted() -> None:
    worse, better = make_comparison((5, 40, 555), (5, 30, 565)), make_comparison((40, 5, 555), (30, 5, 565))
    assert worse.high < 0
    assert not worse.not_worse
    assert better.low > 0
    assert better.not_worse


def test_no_difference_at_all_is_accepted_where_the_parts_can_tell() -> None:
    assert make_comparison((0, 0, 100), (0, 0, 100)).not_worse
    assert make_comparison((0, 0, 10), (0, 0, 10), margin=0.2).not_worse


@pytest.mark.parametrize("per_label", [1, 10, 50, 70])
def test_too_few_parts_to_tell_are_refused(per_label: int) -> None:
    """Though no part came out worse."""
    assert not make_comparison((0, 0, per_label), (0, 0, per_label)).not_worse


def test_too_few_parts_of_one_label_are_refused() -> None:
    assert not make_comparison((0, 0, 20), (0, 0, 2000)).not_worse


@pytest.mark.parametrize(
    ("per_label", "gains", "losses"), [(100, 0.0, 0.02), (100, 0.01, 0.03), (600, 0.0, 0.02), (600, 0.04, 0.06)]
)
def test_worse_by_the_margin_passes_about_one_time_in_forty(per_label: int, gains: float, losses: float) -> None:
    # 2.5 %, and three standard errors of 400 sets.
    assert accepted_share(per_label, gains, losses) < 0.025 + 0.0234


def test_equally_good_passes_with_the_parts_that_promotions_are_decided_on() -> None:
    assert accepted_share(600, 0.015, 0.015) > 0.9
    assert 0.65 < accepted_share(600, 0.03, 0.03) < 0.9
    assert accepted_share(100, 0.03, 0.03) < 0.3


def test_one_label_alone_is_refused() -> None:
    with pytest.raises(ValueError, match="normal and anomalous"):
        compare([True], [True], [True], MARGIN)


def test_verdicts_on_other_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter than"):
        compare([True, False], [True, False], [True], MARGIN)
