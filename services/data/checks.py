"""What a thought may not be. Pure.

The same rules for normal and anomalous parts: a type of defect is refused before it can be seen, whether or not this
part has it, else a thought that names none would tell as much as one that does. Nor may a thought give the verdict or
a place away (words.py says why).
"""

import re
from collections.abc import Sequence

MIN_WORDS, MAX_WORDS = 3, 90
MAX_CHARACTERS = 600

# Reasons are sentences for the writer, and the keys under which they are counted.
ENCODING = "It must be plain text without control characters."
PARAGRAPH = "It must be one paragraph."
LENGTH = f"It must have {MIN_WORDS} to {MAX_WORDS} words and at most {MAX_CHARACTERS} characters."
MARKUP = "It must hold no tags, JSON, boxes, lists or markup."
COORDINATES = "It must hold no coordinates or measures."
PLACE = "It must not say where in the picture something is."
VERDICT = "It must not state the verdict."
TYPE = "It must not name a type of defect before one can be seen."

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd]")
_MARKUP = re.compile(r"[<>{}\[\]`|*#_]|^(?:[-•]|\d+[.)])\s")
_COORDINATES = re.compile(
    r"\d*[.,]\d|\d\s*(?:px|pixels?|%|percent|mm|cm)\b|\d\s*%|\d\s*[;x×/]\s*\d|\b[xy]\s*[=:≈]|\d{2}", re.IGNORECASE
)
_SIDE = r"(?:left|right|top|bottom|upper|lower|cent(?:er|re)|middle)"
_PLACE = re.compile(
    rf"\b(?:upper|lower|top|bottom|left|right)[\s-]+(?:left|right|half|edge|corner|side|part|area|region|third|quarter"
    rf"|quadrant)\b|\b(?:on|to|at|in|near|towards?|along|from) the (?:(?:far|very|extreme|image|part)\S* )?{_SIDE}\b"
    rf"|\b(?:left|right|top|bottom)-?most\b|\bcorner\b",
    re.IGNORECASE,
)
_FAULT = r"(?:anomal(?:y|ies)|defects?|flaws?|faults?|damages?|irregularit(?:y|ies)|abnormalit(?:y|ies))"
_STATE = (
    r"(?:(?:non-?|un|ab)?normal|defective|anomalous|faulty|flawless|defect-free|intact|damaged|unharmed|broken"
    r"|good|bad|ok(?:ay)?|fine|acceptable|unacceptable|spotless)"
)
_VERDICT = re.compile(
    rf"\b(?:no|not? an?y?|without(?: an?y?)?|free (?:of|from)(?: an?y?)?|zero)(?: \w+){{0,2}} {_FAULT}\b"
    rf"|\b(?:is|are|was|were|looks?|appears?|seems?|remains?)(?: to be)?(?: not)?(?: (?:an?|the))?(?: (?!no\b)\w+)?"
    rf" (?:{_STATE}|{_FAULT})\b"
    rf"|\bthere(?:'s| is| are| must be)(?: an?)?(?: \w+){{0,2}} {_FAULT}\b"
    rf"|\b{_FAULT} (?:is |are |was |were )?(?:\w+ )?(?:present|confirmed|found|visible|absent|detected|there|exists?)\b"
    rf"|\b(?:a|this|the) (?:\w+ )?(?:defective|anomalous|faulty|damaged) (?:part|unit|item|product|one|piece)\b"
    r"|\b(?:passes|pass the|fails|fail the|reject(?:ed)?|accept(?:ed)? (?:it|the part))\b"
    r"|\bnothing (?:is )?(?:wrong|abnormal|unusual|amiss)\b|\b(?:something|it) is wrong\b",
    re.IGNORECASE,
)


def fault(thought: str, known: bool, kinds: Sequence[str]) -> str | None:
    """Why the thought cannot be used, or None.

    `kinds`: all defect types of the set; `known`: the pictures so far can show one.
    """
    try:
        thought.encode()
    except UnicodeEncodeError:
        return ENCODING
    if len(thought) > MAX_CHARACTERS or not MIN_WORDS <= len(thought.split()) <= MAX_WORDS:
        return LENGTH
    if _CONTROL.search(thought):
        return ENCODING
    if "\n" in thought:
        return PARAGRAPH
    rules = ((_MARKUP, MARKUP), (_COORDINATES, COORDINATES), (_PLACE, PLACE), (_VERDICT, VERDICT))
    for pattern, reason in rules:
        if pattern.search(thought):
            return reason
    return TYPE if not known and any(_named(kind).search(thought) for kind in kinds) else None


def _named(kind: str) -> re.Pattern[str]:
    """A type in a sentence: `wrong_element` as "wrong element", `spots` also as "spot"."""
    words = [re.escape(word) for word in re.split(r"[_\W]+", kind.removesuffix("s")) if word]
    phrase = r"[\s_-]+".join(words)
    return re.compile(rf"\b{phrase}(?:s|es|ed|d|ing)?\b" if words else r"(?!)", re.IGNORECASE)
