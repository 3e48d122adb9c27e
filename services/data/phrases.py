"""Thoughts composed from parts, so that a policy learns what to think of and not a sentence by heart. Pure.

A pattern names slots in braces; each is filled with one of its parts. No part names a place, a type of defect or a
verdict, and no pattern is kept for one label: the situation is all that decides.
"""

import re

import numpy as np

_SLOT = re.compile(r"\{(\w+)\}")
_SENTENCE_START = re.compile(r"(^|[.?!] )([a-z])")

PATTERNS: dict[str, tuple[str, ...]] = {
    "look_closer": (
        "{something} {draws}. {closer}.",
        "{something} {draws}; {closer}.",
        "{something} {draws}, but {unclear}. {closer}.",
        "From this far {unclear}. {closer}.",
        "{closer}: {something} {draws} and {unclear}.",
        "Before anything else, {closer}, since {something} {draws}.",
    ),
    "look_again": (
        "{missed}. {again}.",
        "{missed}; {again}.",
        "{again}, because {missed}.",
        "{what_drew} is not in this view. {again}.",
    ),
    "compare": (
        "{many}; {need}.",
        "{many}. {need}.",
        "{many}; {cannot}. {ask}.",
        "{many}. {need}, as {cannot}.",
        "{cannot}, so {ask}.",
        "{cannot}. {ask}.",
        "{ask}: {cannot}.",
    ),
    "compare_detail": (
        "{closer_seen}; {need}.",
        "{closer_seen}, yet {cannot}. {ask}.",
        "{closer_seen}. {ask} and see how the two agree.",
        "{question} {ask}.",
    ),
    "check_difference": (
        "{compared}. {one_place} {deserves}.",
        "{compared}; now {detail}.",
        "{one_place} {deserves}, so {detail}.",
        "{detail} before {deciding}.",
    ),
    "whole": (
        "{part_seen}; {all_of_it}.",
        "{part_seen}, so {all_of_it}.",
        "{all_of_it}, as {part_seen}.",
        "{part_seen}. {all_of_it} before {deciding}.",
    ),
    "decide": (
        "{enough}.",
        "{enough}; {judge}.",
        "{enough}. {judge}.",
        "{views} {tell}, and {judge}.",
        "{views} {tell}. {enough}.",
    ),
    "first_glance": (
        "{surface} {in_view}, and {judge}.",
        "{surface} {in_view}. {enough}.",
        "{judge}: {surface} {in_view}.",
        "No tool is needed; {surface} {in_view}.",
    ),
    "no_exemplar": (
        "{none_had}; {alone}.",
        "{none_had}, so {alone}.",
        "{none_had}. {alone}.",
    ),
}

_PARTS: dict[str, tuple[str, ...]] = {
    "something": (
        "something", "one bit of the surface", "a detail", "a small area", "one patch", "a mark of some kind",
    ),
    "draws": (
        "draws the eye", "stands out", "catches my attention", "differs a little from what surrounds it",
        "asks for a second look", "is not like the rest of the surface",
    ),
    "unclear": (
        "I cannot tell what it is", "it is too small to judge", "its outline is blurred", "its nature stays open",
        "it could be dirt or more than that", "the view is too coarse for it",
    ),
    "closer": (
        "look closer", "zoom in on it", "a closer view will tell", "see it enlarged", "bring it nearer",
        "enlarge that area first",
    ),
    "missed": (
        "that was beside it", "this view shows another area", "I looked past it", "the crop went astray",
        "what I was after lies outside this crop",
    ),
    "again": ("look again", "try another place", "aim anew", "move the view", "take another crop", "zoom once more"),
    "what_drew": ("what drew the eye", "what I was after", "the thing that stood out", "the detail in question"),
    "many": (
        "many details here", "a crowded design", "there is much on this part", "every element could matter",
        "the design is new to me", "the part carries a pattern of its own",
    ),
    "need": (
        "compare with a normal part", "a normal part will tell how it should be", "I need its normal twin beside it",
        "let me see a normal one", "a reference is what I need", "set it against a normal unit",
    ),
    "cannot": (
        "one picture cannot tell what belongs here", "from this alone I cannot know the intended design",
        "I do not know how it should look", "the plan of the part is not known to me",
        "nothing in this view says what was meant",
    ),
    "ask": (
        "ask for a normal part", "fetch a normal unit", "compare it with a normal one", "get a reference to compare",
        "bring up a normal part of the same kind", "request a normal sample",
    ),
    "closer_seen": (
        "seen closer", "I have a near view of it now", "the crop is sharp", "this area is large enough to compare",
        "the detail is clear to see", "the near view is had",
    ),
    "question": (
        "is that how it should be?", "does it belong here?", "was it meant like this?", "is this part of the design?",
        "would another unit show the same?", "is that as designed?",
    ),
    "compared": (
        "the two are laid over each other", "both parts are in view", "the comparison is there",
        "part and reference are aligned", "I see the two together",
    ),
    "one_place": ("one place", "one detail of it", "a small region", "one element", "an area of the overlay"),
    "deserves": (
        "deserves a closer look", "is worth enlarging", "should be seen from near", "calls for a zoom",
        "needs more resolution",
    ),
    "detail": (
        "look at a detail of the comparison", "zoom into the comparison", "enlarge one region of the two",
        "view a piece of the overlay closer", "take a near view of both",
    ),
    "deciding": ("deciding", "the verdict", "I settle on an answer", "I judge", "giving an answer"),
    "part_seen": (
        "only a piece was compared", "so far I compared one area", "the rest is still unseen next to its reference",
        "that region alone is not everything", "one crop does not cover the part",
    ),
    "all_of_it": (
        "compare the whole part", "look at all of it", "the whole part next", "widen the comparison to everything",
        "lay the entire part over its reference",
    ),
    "enough": (
        "that is enough to decide", "I have seen what I need", "this settles it", "nothing more has to be looked at",
        "the evidence is complete", "no further view is needed", "the question is answered",
    ),
    "judge": (
        "now I can judge", "time for the verdict", "I can give my answer", "let me decide", "I am ready to answer",
        "the decision can be made",
    ),
    "views": ("the views so far", "these pictures", "the looks I took", "the images together"),
    "tell": ("tell enough", "are clear", "leave no open question", "give what I was after", "suffice"),
    "surface": ("the whole surface", "all of the part", "every region", "the entire part", "the full face of it"),
    "in_view": (
        "is in view", "can be judged from here", "is plain to see", "is sharp enough as it is",
        "shows well at this distance",
    ),
    "none_had": (
        "no comparison is to be had", "there is no normal part to compare with", "a reference cannot be found",
        "the library holds none of this kind", "nothing came back to compare with",
    ),
    "alone": (
        "judge by what is seen", "decide without a comparison", "the pictures at hand must do",
        "the view of the part itself has to be enough", "I go by the part alone",
    ),
}  # fmt: skip


def compose(rng: np.random.Generator, situation: str) -> str:
    """One to three sentences for a situation (a key of PATTERNS; KeyError)."""
    patterns = PATTERNS[situation]
    text = patterns[int(rng.integers(len(patterns)))]
    while slot := _SLOT.search(text):
        parts = _PARTS[slot[1]]
        text = text[: slot.start()] + parts[int(rng.integers(len(parts)))] + text[slot.end() :]
    return _SENTENCE_START.sub(lambda start: start[1] + start[2].upper(), text.replace("?.", "?"))
