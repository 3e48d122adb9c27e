"""Composed thoughts vary, and the words chosen change nothing but the words."""

from collections import Counter

import numpy as np
import pytest

from services.data import checks, phrases, procedural, source
from services.data.words import Words
from tests.data.make_sets import make_source

KINDS = sorted({kind for kinds in procedural.DEFECTS.values() for kind in kinds})


@pytest.mark.parametrize("situation", phrases.PATTERNS)
def test_composed_thoughts_are_many_and_pass_the_checks_of_written_ones(situation: str) -> None:
    rng = np.random.default_rng(0)
    said = Counter(phrases.compose(rng, situation) for _ in range(2000))
    assert len(said) > 60
    assert max(said.values()) < 2000 * 0.1
    assert {thought: checks.fault(thought, False, KINDS) for thought in said} == dict.fromkeys(said)


def test_the_choice_of_words_changes_thoughts_alone() -> None:
    changed = 0
    for index in range(24):
        plain = source.demonstration(index, make_source(Words.PLAIN))
        varied = source.demonstration(index, make_source(Words.VARIED))
        assert varied.truth == plain.truth
        assert varied.imitate == plain.imitate
        assert [view.marks for view in varied.views] == [view.marks for view in plain.views]
        assert all(
            np.array_equal(np.asarray(a.image), np.asarray(b.image))
            for a, b in zip(varied.views, plain.views, strict=True)
        )
        for mine, theirs in zip(varied.trajectory.turns, plain.trajectory.turns, strict=True):
            assert mine.generation.text.split("</think>")[-1] == theirs.generation.text.split("</think>")[-1]
            changed += mine.generation.text != theirs.generation.text
    assert changed > 24
