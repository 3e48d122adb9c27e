"""One picture that tells an inspection at a glance: the decision, the original with boxes, each step, the answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from urllib.parse import unquote

from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.cli import story
from services.cli.cards import ANSWER_COLOUR, TRUTH_COLOUR, Load, Tile, close_up, original_tile, step_cards
from services.cli.drawing import Rect, Sheet, Size, contained, framed, leading, resized, shorten, width, wrap
from services.cli.layout import (
    CAPTION_GAP,
    CARD_HEAD,
    LEGEND,
    MARGIN,
    PAD,
    THOUGHT,
    TILE_GAP,
    WIDTH,
    Arrangement,
    Placed,
    arrange,
    main_width,
    side_size,
)

DECISION_COLOURS = {"pass": "#15803D", "reject": "#DC2626", "review": "#B45309", "undecided": "#6B7280"}

_PAPER, _CARD, _LINE, _MOUNT = "#F3F4F6", "#FFFFFF", "#DFE2E7", "#ECEEF2"
_INK, _SOFT, _FAINT = "#111827", "#374151", "#6B7280"
_HEADING, _SMALL = 26, 20
_UNREADABLE = (560, 360)  # the room of an original that cannot be shown
_MIN_CLOSE_UP = 180  # the height from which the answer's card shows the place that it names
# The channels of a composite.
_CHANNELS = (("this part", "#E5484D"), ("normal part", "#22A355"), ("difference", "#3B66F5"))


@dataclass(frozen=True)
class _Line:
    text: str
    size: int = THOUGHT
    colour: str = _SOFT
    bold: bool = False
    before: int = 0  # space above


def evidence(
    inspection: events_pb2.InspectionCompleted, load: Load, truth: pb.GroundTruth | None = None
) -> Image.Image:
    """RGB, WIDTH pixels wide, as high as it needs. A picture that `load` cannot give becomes a tile with the reason.

    `load` may raise the errors of `services.chassis.errors`, and OSError.
    """
    original = original_tile(inspection, load, truth)
    cards = step_cards(inspection, original, load)
    size = original.image.size if original.image is not None else _UNREADABLE
    places = arrange(size, cards, lambda room: _lines_height(_answer_lines(inspection, room)))
    sheet = Sheet((WIDTH, places.height), _PAPER)
    _draw_header(sheet, inspection, truth)
    _draw_original(sheet, original, places)
    for placed in places.cards:
        _draw_card(sheet, placed)
    _draw_answer(sheet, places.answer, _answer_lines(inspection, places.answer[2] - places.answer[0]), original)
    return sheet.image


def _draw_header(sheet: Sheet, inspection: events_pb2.InspectionCompleted, truth: pb.GroundTruth | None) -> None:
    decision = story.DECISIONS[inspection.decision]
    right, pill = WIDTH - MARGIN, 252
    sheet.panel((0, 0, WIDTH, 12), DECISION_COLOURS[decision])
    sheet.panel((right - pill, 52, right, 144), DECISION_COLOURS[decision], radius=18)
    sheet.text(right - pill / 2, 98, decision.upper(), 40, "white", bold=True, anchor="mm")
    gauge = right - pill - 60 - 360
    _draw_score(sheet, gauge, 360, inspection)
    room = gauge - MARGIN - 60
    name = unquote(PurePosixPath(inspection.trajectory.task.image.reference.uri).name)
    sheet.text(MARGIN, 46, shorten(name, 22, room), 22, _FAINT)
    sheet.text(MARGIN, 74, shorten(inspection.category or "no category", 50, room), 50, _INK, bold=True)
    took = f"{inspection.latency.ToTimedelta().total_seconds():.2f} s"
    made_by = f"{inspection.policy_version or 'unknown policy'}  ·  {took}"
    sheet.text(right, 184, shorten(made_by, 22, 500), 22, _FAINT, anchor="rm")
    x = _chip(sheet, MARGIN, f"answer: {story.verdict_words(inspection)}", DECISION_COLOURS[decision])
    if truth is not None:
        words = {True: "correct", False: "wrong", None: "undecided"}[story.judged(inspection, truth)]
        colour = {True: "#15803D", False: "#DC2626", None: "#6B7280"}[story.judged(inspection, truth)]
        x = _chip(sheet, x, f"truth: {story.truth_words(truth)}", _INK)
        x = _chip(sheet, x, words, colour, filled=True)
    if not inspection.trajectory.category_known:
        _chip(sheet, x, "category unknown to this policy", "#DC2626", filled=True)


def _chip(sheet: Sheet, x: int, text: str, colour: str, *, filled: bool = False) -> int:
    """A short label in a box with round ends; returns where the next one may begin."""
    text = shorten(text, 22, 420)
    right = x + round(width(text, 22)) + 40
    sheet.panel((x, 162, right, 206), colour if filled else _CARD, radius=22, outline=colour)
    sheet.text((x + right) / 2, 184, text, 22, "white" if filled else colour, bold=True, anchor="mm")
    return right + 14


def _draw_score(sheet: Sheet, x: int, extent: int, inspection: events_pb2.InspectionCompleted) -> None:
    """A scale from 0 to 1 with the zones that pass, go to review and reject, and the score on it."""
    score = inspection.raw_score if inspection.HasField("raw_score") else math.nan
    known = math.isfinite(score)
    sheet.text(x, 62, "Anomaly score", _SMALL, _FAINT)
    sheet.text(x + extent, 50, f"{score:.2f}" if known else "none", 36, _INK, bold=True, anchor="ra")
    low, high = (
        _clamped(inspection.threshold - inspection.review_band),
        _clamped(inspection.threshold + inspection.review_band),
    )
    edges = [x, x + round(low * extent), x + round(high * extent), x + extent]
    sheet.panel((x, 104, x + extent, 118), "#F5B5B5", radius=7)
    sheet.panel((x, 104, max(edges[2], x + 14), 118), "#F3CF8E", radius=7)
    sheet.panel((x, 104, max(edges[1], x + 14), 118), "#A9D8B8", radius=7)
    tick = x + round(_clamped(inspection.threshold) * extent)
    sheet.panel((tick - 1, 100, tick + 2, 122), _SOFT)
    label = f"threshold {inspection.threshold:.2f}"
    half = round(width(label, _SMALL) / 2)
    sheet.text(min(max(tick, x + half), x + extent - half), 130, label, _SMALL, _FAINT, anchor="ma")
    if known:
        centre = x + round(_clamped(score) * extent)
        sheet.panel((centre - 14, 97, centre + 14, 125), _INK, radius=14, outline="white", line=4)


def _draw_original(sheet: Sheet, tile: Tile, places: Arrangement) -> None:
    left, top, right, _ = places.original
    middle = top + CARD_HEAD // 2 + 1
    sheet.panel(places.original, _CARD, radius=18, outline=_LINE)
    _heading(sheet, left + PAD, middle, "The part", right - left - 2 * PAD)
    if tile.image is not None:
        size = f"{tile.image.width} × {tile.image.height} px"
        sheet.text(right - PAD, middle, size, _SMALL, _FAINT, anchor="rm")
    room = (left + PAD, top + CARD_HEAD, right - PAD, top + CARD_HEAD + places.picture[1])
    _draw_tile(sheet, tile, room)
    x, y = left + PAD, room[3] + LEGEND // 2 + 6
    for wanted, dashed, label in ((ANSWER_COLOUR, False, "the answer"), (TRUTH_COLOUR, True, "the truth")):
        if any(frame.colour == wanted and frame.number is None for frame in tile.frames):
            sheet.panel((x, y - 9, x + 26, y + 9), _CARD, outline=wanted, line=4)
            if dashed:
                sheet.panel((x + 10, y - 9, x + 16, y + 9), _CARD)
            x = sheet.text(x + 36, y, label, _SMALL, _SOFT, anchor="lm") + 26


def _draw_card(sheet: Sheet, placed: Placed) -> None:
    card, (left, top, right, _) = placed.card, placed.rect
    sheet.panel(placed.rect, _CARD, radius=18, outline=_LINE)
    middle = top + CARD_HEAD // 2 + 1
    sheet.badge(left + PAD, middle - 18, 36, card.colour, str(card.number))
    title = left + PAD + 48
    end = _heading(sheet, title, middle, card.title, right - PAD - title)
    if end + 20 + width(card.took, _SMALL) <= right - PAD:
        sheet.text(right - PAD, middle, card.took, _SMALL, _FAINT, anchor="rm")
    x, y = left + PAD, top + CARD_HEAD
    for i, tile in enumerate(card.main):
        wide = main_width(card, placed.tile, i) + placed.spare
        _draw_tile(sheet, tile, (x, y, x + wide, y + placed.tile))
        x += wide + TILE_GAP
    side_y = y
    for tile in card.side:
        wide, high = side_size(card, placed.tile)
        _draw_tile(sheet, tile, (x, side_y, x + wide, side_y + high))
        side_y += high + TILE_GAP
    y += placed.tile
    if card.composite:
        _draw_legend(sheet, left + PAD, y + LEGEND // 2 + 6)
        y += LEGEND
    sheet.lines(left + PAD, y + CAPTION_GAP, placed.thought, THOUGHT, _SOFT)


def _heading(sheet: Sheet, x: int, middle: int, text: str, room: int) -> int:
    """Returns where it ends."""
    # On the baseline, so that titles with and without descenders stand level.
    return sheet.text(x, middle + 9, shorten(text, _HEADING, room), _HEADING, _INK, bold=True, anchor="ls")


def _draw_legend(sheet: Sheet, x: int, y: int) -> None:
    for label, colour in _CHANNELS:
        sheet.panel((x, y - 8, x + 16, y + 8), colour, radius=4)
        x = sheet.text(x + 24, y, label, _SMALL, _SOFT, anchor="lm") + 22


def _draw_tile(sheet: Sheet, tile: Tile, room: Rect) -> None:
    """The picture in the middle of its room, or the reason why there is none."""
    size: Size = (room[2] - room[0], room[3] - room[1])
    sheet.panel(room, _MOUNT, radius=8)
    if tile.image is None:
        lines = wrap(tile.reason, _SMALL, size[0] - 32, max(1, (size[1] - 40) // leading(_SMALL)))
        y = room[1] + (size[1] - len(lines) * leading(_SMALL)) // 2
        for i, line in enumerate(lines):
            middle = (room[0] + room[2]) / 2
            sheet.text(middle, y + i * leading(_SMALL), line, _SMALL, _FAINT, anchor="ma")
    else:
        shown = contained(tile.image.size, size)
        picture = framed(resized(tile.image, shown), tile.frames)
        sheet.picture(picture, room[0] + (size[0] - shown[0]) // 2, room[1] + (size[1] - shown[1]) // 2, _LINE)
    if tile.label:
        label = shorten(tile.label, 18, size[0] - 36)
        sheet.panel((room[0] + 8, room[3] - 36, room[0] + 28 + round(width(label, 18)), room[3] - 8), _INK, radius=8)
        sheet.text(room[0] + 18, room[3] - 22, label, 18, "white", anchor="lm")


def _answer_lines(inspection: events_pb2.InspectionCompleted, card_width: int) -> list[_Line]:
    room = card_width - 2 * PAD
    told = story.tell(inspection.trajectory)
    colour = DECISION_COLOURS[story.DECISIONS[inspection.decision]]
    words = story.verdict_words(inspection)
    lines = [_Line("The answer", _HEADING, _INK, bold=True)]
    lines += [_Line(line, 38, colour, bold=True, before=6) for line in wrap(words, 38, room, 2)]
    thought = story.thought(told.answer or "")
    if thought:
        lines += _paragraph(f"“{thought}”", room, 4, _SOFT)
    for description in list(inspection.verdict.visual_descriptions)[:4]:
        lines += _paragraph(f"-  {description}", room, 2, _SOFT)
    if inspection.trajectory.stop_reason != pb.STOP_REASON_ANSWERED:
        lines += _paragraph(
            story.STOP_REASONS[inspection.trajectory.stop_reason].capitalize() + ".", room, 2, "#B45309"
        )
    return lines


def _paragraph(text: str, room: int, count: int, colour: str) -> list[_Line]:
    return [
        _Line(line, colour=colour, before=0 if i else 10) for i, line in enumerate(wrap(text, THOUGHT, room, count))
    ]


def _lines_height(lines: Sequence[_Line]) -> int:
    return 18 + sum(line.before + leading(line.size) for line in lines) + PAD


def _draw_answer(sheet: Sheet, rect: Rect, lines: Sequence[_Line], original: Tile) -> None:
    sheet.panel(rect, _CARD, radius=18, outline=_LINE)
    y = rect[1] + 18
    for line in lines:
        y += line.before
        sheet.text(rect[0] + PAD, y, line.text, line.size, line.colour, bold=line.bold)
        y += leading(line.size)
    room = (rect[0] + PAD, y + 14, rect[2] - PAD, rect[3] - PAD)
    if room[3] - room[1] >= _MIN_CLOSE_UP:
        tile = close_up(original, (room[2] - room[0]) / (room[3] - room[1]))
        if tile is not None:
            _draw_tile(sheet, tile, room)


def _clamped(value: float) -> float:
    return min(max(value, 0.0), 1.0) if math.isfinite(value) else 0.0
