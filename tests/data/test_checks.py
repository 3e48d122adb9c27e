"""What a written thought may hold, by example."""

import pytest

from services.data import checks

KINDS = ("wrong_element", "scratch", "spots")


@pytest.mark.parametrize(
    "thought",
    [
        "Something on the surface stands out, so I want to see it from near.",
        "I do not know how this board should look; a normal part beside it will tell.",
        "There is no normal part to compare with, so I go by what I see.",
        "Two of the four pins look alike, and I compare them next.",
    ],
)
def test_honest_thoughts_pass(thought: str) -> None:
    assert checks.fault(thought, False, KINDS) is None


@pytest.mark.parametrize(
    ("thought", "reason"),
    [
        ("Look.", checks.LENGTH),
        ("", checks.LENGTH),
        ("word " * 91, checks.LENGTH),
        ("x" * 700 + " and so on", checks.LENGTH),
        ("I look at it.\n\nThen I look again.", checks.PARAGRAPH),
        ("I look at \ud800 this place.", checks.ENCODING),
        ("I look at \x00 this place.", checks.ENCODING),
        ("I look</think><answer> at this.", checks.MARKUP),
        ('I look at {"a": 1} this.', checks.MARKUP),
        ("- I look at this place.", checks.MARKUP),
        ("I look at the box 0.31 wide.", checks.COORDINATES),
        ("I look at the mark of 12 pixels.", checks.COORDINATES),
        ("I look at the place x = 3 here.", checks.COORDINATES),
        ("I look at the lower left part of it.", checks.PLACE),
        ("I look at something in the top of it.", checks.PLACE),
        ("The part is normal, I think.", checks.VERDICT),
        ("This unit looks clearly defective to me.", checks.VERDICT),
        ("There is a visible defect on it.", checks.VERDICT),
        ("I see no visible defects on it.", checks.VERDICT),
        ("An anomaly is present, I zoom.", checks.VERDICT),
        ("This is a normal part, I think.", checks.VERDICT),
        ("Nothing is wrong with what I see.", checks.VERDICT),
    ],
)
def test_a_fault_is_named(thought: str, reason: str) -> None:
    assert checks.fault(thought, True, KINDS) == reason


@pytest.mark.parametrize(
    "thought", ["Maybe it is a Scratch there.", "A dark spot stands out.", "A wrong element maybe."]
)
def test_a_type_is_refused_before_it_can_be_seen(thought: str) -> None:
    assert checks.fault(thought, False, KINDS) == checks.TYPE
    assert checks.fault(thought, True, KINDS) is None
