"""The text-only probe: it finds a leak where there is one, and none in the composed thoughts."""

import numpy as np

from services.data import source
from services.data.build import first_thought
from services.data.demonstrations import Episode
from services.data.probe import probe
from tests.data.make_sets import make_source

EPISODES = 420


def make_rows() -> list[tuple[str, str, bool]]:
    rows = []
    for index in range(EPISODES):
        demo = source.demonstration(index, make_source())
        rows += first_thought(Episode(demo.trajectory, demo.truth, demo.imitate, [], {}))
    return rows


def test_composed_thoughts_before_evidence_do_not_give_the_label_away() -> None:
    rows = make_rows()
    found = probe(rows)
    assert found is not None
    assert len(rows) > EPISODES / 2
    assert found.margin < 0.2
    assert not found.leaks
    # The very same thoughts, each with a word that one label uses a little more often: the probe sees that.
    rng = np.random.default_rng(0)
    slanted = [
        (situation, f"{thought} {'hm' if rng.uniform() < (0.9 if label else 0.1) else 'well'}", label)
        for situation, thought, label in rows
    ]
    leaking = probe(slanted)
    assert leaking is not None
    assert leaking.leaks


def test_an_action_that_follows_the_label_is_no_leak_of_words() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for label in rng.uniform(size=400) < 0.5:
        looks = rng.uniform() < (0.9 if label else 0.3)
        rows.append(("look" if looks else "compare", "closer" if looks else "a normal one", bool(label)))
    found = probe(rows)
    assert found is not None
    assert not found.leaks


def test_too_few_thoughts_tell_nothing() -> None:
    assert probe([]) is None
    assert probe([("look", "closer", True)] * 9) is None
