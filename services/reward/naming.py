"""How near the name of a defect is to another. Pure; the time grows with the names' length only."""

from __future__ import annotations

import itertools
import re
from collections import Counter

_WORD = re.compile(r"[^\W_]+")
# What a name that is not the same can get at the most: the same letters in another order still are another name.
ALIKE = 0.8


def normalised(name: str) -> str:
    """The words in small letters with a space between: case, underscores, hyphens and spaces make no difference."""
    return " ".join(_WORD.findall(name.casefold()))


def similarity(one: str, other: str) -> float:
    """1 for the same name, else below 1: ALIKE times the share of letter pairs in common (Dice's coefficient of the
    pairs of neighbours in each word, its ends included). 0 if a name has no letters."""
    one, other = normalised(one), normalised(other)
    if not one or not other:
        return 0.0
    if one == other:
        return 1.0
    ours, theirs = _pairs(one), _pairs(other)
    return ALIKE * 2 * (ours & theirs).total() / (ours.total() + theirs.total())


def _pairs(name: str) -> Counter[tuple[str, str]]:
    return Counter(pair for word in name.split() for pair in itertools.pairwise(f" {word} "))
