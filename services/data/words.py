"""What demonstrations say: short thoughts and descriptions, from templates.

A thought before an answer never gives the verdict away: the decision falls at the verdict token, whose probability is
the raw score of the inspection. What was seen is told after it, in the descriptions. Nor does a thought name a place:
the box does, and a small policy would else learn the box from the words instead of the picture.
`Words` chooses between few fixed sentences and composed ones; the choice changes nothing but the words.
"""

from enum import Enum

import numpy as np

from services.data import phrases

Box = tuple[float, float, float, float]


class Words(Enum):
    PLAIN = "plain"  # few short sentences: a policy of pocket's size spends little on them
    VARIED = "varied"  # composed from parts: too many to be memorised


_LOOK_CLOSER = (
    "Something draws the eye. Look closer.",
    "A mark, too small to judge from here.",
    "There is a spot; a closer look will tell what it is.",
)
_LOOK_AGAIN = (
    "That was beside it. Look again.",
    "Not there; try another place.",
)
_COMPARE = (
    "Only a normal part tells whether all is in its place.",
    "Many details; compare with a normal part.",
    "What belongs here? A normal part will tell.",
    "I need to know how it should look.",
)
_COMPARE_DETAIL = (
    "Seen closer; now compare it with a normal part.",
    "Is that how it should be? Compare.",
    "A normal part will tell whether this belongs here.",
)
_CHECK_DIFFERENCE = (
    "One place is worth a closer look.",
    "Look at a detail of the comparison.",
)
_WHOLE = ("Compare the whole part.", "Look at all of it.", "The whole part next.")
_DECIDE = (
    "That is enough to decide.",
    "I have seen what I need.",
    "Now I can judge.",
    "This settles it.",
)
_FIRST_GLANCE = ("The whole surface is in view.", "All of it can be judged from here.", "One look is enough.")
_NO_EXEMPLAR = ("No comparison to be had; judge by what is seen.", "Decide without a comparison.")

_DESCRIPTIONS = {
    "scratch": ("thin dark scratch", "fine scratch line"),
    "dent": ("ring-shaped dent", "small round dent"),
    "spots": ("cluster of dark spots", "group of small spots"),
    "missing": ("an element is missing", "empty place where the normal part has an element"),
    "displaced": ("an element is out of place", "element shifted against the normal part"),
    "extra": ("an element too many", "element that the normal part does not have"),
    "wrong_element": ("an element of the wrong kind", "other element than on the normal part"),
    "wrong_stamp": ("stamp differs from the normal part", "wrong stamp"),
    "incomplete_stamp": ("strokes of the stamp are missing", "incomplete stamp"),
}


def place(box: Box) -> str:
    """Where the middle of a box lies, in a grid of nine."""
    column = min(int((box[0] + box[2]) / 2 * 3), 2)
    row = min(int((box[1] + box[3]) / 2 * 3), 2)
    if column == 1:
        return ("top", "middle", "bottom")[row]
    side = "left" if column == 0 else "right"
    return side if row == 1 else f"{('upper', '', 'lower')[row]} {side}"


def look_closer(rng: np.random.Generator, words: Words) -> str:
    return _say(rng, words, "look_closer", _LOOK_CLOSER)


def look_again(rng: np.random.Generator, words: Words) -> str:
    return _say(rng, words, "look_again", _LOOK_AGAIN)


def check_difference(rng: np.random.Generator, words: Words) -> str:
    return _say(rng, words, "check_difference", _CHECK_DIFFERENCE)


def compare(rng: np.random.Generator, words: Words, looked: bool) -> str:
    if looked:
        return _say(rng, words, "compare_detail", _COMPARE_DETAIL)
    return _say(rng, words, "compare", _COMPARE)


def whole(rng: np.random.Generator, words: Words) -> str:
    return _say(rng, words, "whole", _WHOLE)


def decide(rng: np.random.Generator, words: Words, looked: bool, refused: bool = False) -> str:
    if refused:
        return _say(rng, words, "no_exemplar", _NO_EXEMPLAR)
    return _say(rng, words, "decide", _DECIDE) if looked else _say(rng, words, "first_glance", _FIRST_GLANCE)


def describe(rng: np.random.Generator, kind: str, box: Box) -> str:
    known = _DESCRIPTIONS.get(kind)
    return f"{_pick(rng, known) if known else kind.replace('_', ' ')}, {place(box)}"


def _say(rng: np.random.Generator, words: Words, situation: str, plain: tuple[str, ...]) -> str:
    # The same draw whichever words are chosen, so that the episode around them stays the same.
    sentence = _pick(rng, plain)
    return sentence if words is Words.PLAIN else phrases.compose(rng.spawn(1)[0], situation)


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
