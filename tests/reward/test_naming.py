"""Names of defects that are the same, alike or different."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.reward.naming import ALIKE, similarity
from tests.reward.strategies import PATIENT


@pytest.mark.parametrize("name", ["Missing Hole", "missing_hole", " MISSING-HOLE ", "missing  hole."])
def test_the_same_name(name: str) -> None:
    assert similarity("missing_hole", name) == 1


def test_alike_names_by_hand() -> None:
    # Pairs with the ends: " b" "be" "en" "nt" "t ", against " b" "be" "en" "nd" "d ": three of five.
    assert similarity("bent", "bend") == pytest.approx(ALIKE * 3 / 5)
    # The same pairs, another name.
    assert similarity("hole missing", "missing hole") == pytest.approx(ALIKE)
    assert similarity("dent", "scorch") == 0
    assert similarity("", "dent") == similarity("dent", "_ ") == similarity("", "") == 0


def test_to_name_everything_is_worth_less_than_the_name() -> None:
    assert similarity("scratch dent hole crack stain", "scratch") < similarity("scratch mark", "scratch") < 1


@PATIENT
@given(st.text(), st.text())
def test_any_names(one: str, other: str) -> None:
    assert 0 <= similarity(one, other) <= 1
    assert similarity(one, other) == pytest.approx(similarity(other, one))
