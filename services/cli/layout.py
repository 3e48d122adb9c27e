"""Where the parts of an evidence picture go. Pure arithmetic in pixels.

┌ header ──────────────────────────────────┐   Wide originals lie above the steps. Steps fill rows like a justified
│ original │ step 1 │ step 2               │   gallery; once below the original they take the whole width. The
│          │ answer                        │   answer takes what is left of the last row, or a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.cli.cards import Card
from services.cli.drawing import Rect, Size, contained, leading, wrap

WIDTH = 1600
MARGIN, GAP, PAD, TILE_GAP = 56, 28, 24, 12
HEADER = 226
CARD_HEAD = 62  # of a card: from its edge to its pictures
LEGEND = 42  # under the pictures of a card
THOUGHT = 23  # size of the text
CAPTION_GAP = 14  # between pictures and thought

_CONTENT = WIDTH - 2 * MARGIN
# Heights of a step's pictures; beside the original they may be as high as a square one.
_MIN_TILE, _MAX_TILE, _MAX_TILE_BESIDE = 250, 440, 510
_MIN_ANSWER = 340
_MIN_ORIGINAL = 320
_MIN_BESIDE = 240  # a row starts beside the original if that goes on for so long
_MAX_STRETCH = 400  # of a card, so that it ends with its neighbour
_THOUGHT_LINES = 4
_WIDE, _TALL = 1.75, 0.5  # aspects of originals
_WIDE_ROOM, _ROOM, _TALL_ROOM, _ROOM_ALONE = (_CONTENT - 2 * PAD, 520), (560, 640), (560, 1100), (440, 440)


@dataclass(frozen=True)
class Placed:
    """A card with its place: `tile` is the height of its pictures, `spare` the width that each main one may add."""

    card: Card
    rect: Rect
    tile: int
    spare: int
    thought: tuple[str, ...]


@dataclass(frozen=True)
class Arrangement:
    original: Rect
    picture: Size  # of the original, inside its card
    cards: tuple[Placed, ...]
    answer: Rect
    height: int


def arrange(original: Size, cards: Sequence[Card], answer_height: Callable[[int], int]) -> Arrangement:
    """`answer_height`: of the answer's card at a given width."""
    aspect = original[0] / original[1]
    wide = aspect > _WIDE
    room = _WIDE_ROOM if wide else _TALL_ROOM if aspect < _TALL else _ROOM if cards else _ROOM_ALONE
    picture = contained(original, room)
    right = WIDTH - MARGIN if wide else MARGIN + max(picture[0], _MIN_ORIGINAL) + 2 * PAD
    first = (MARGIN, HEADER, right, HEADER + CARD_HEAD + picture[1] + LEGEND + PAD)
    flow = _Flow(first, MARGIN if wide else right + GAP)
    flow.add_rows(cards)
    answer = flow.answer_rect(answer_height)
    first, *rest = _levelled([first, *(placed.rect for placed in flow.placed), answer])
    placed = tuple(replace(item, rect=rect) for item, rect in zip(flow.placed, rest, strict=False))
    return Arrangement(first, picture, placed, rest[-1], max(rect[3] for rect in (first, *rest)) + MARGIN)


def _levelled(rects: Sequence[Rect]) -> list[Rect]:
    """The same places, those of a row with one bottom; the original's bottom is that of the last row beside it."""
    original, *others = rects
    bottoms: dict[int, int] = {}
    lefts: dict[int, int] = {}
    for left, top, _, bottom in others:
        bottoms[top] = max(bottom, bottoms.get(top, bottom))
        lefts[top] = min(left, lefts.get(top, left))
    beside = [top for top, left in lefts.items() if left >= original[2]]
    if beside:
        low = bottoms[max(beside)]
        if original[3] <= low + _MAX_STRETCH:
            bottoms[max(beside)] = max(low, original[3])
        original = (*original[:3], max(low, original[3]))
    return [original, *((left, top, right, bottoms[top]) for left, top, right, _ in others)]


def main_width(card: Card, tile: int, i: int) -> int:
    """Of the card's i-th main picture at the height `tile`."""
    return round(card.main[i].aspect * tile)


def side_size(card: Card, tile: int) -> Size:
    """Of each of the card's side pictures."""
    height = (tile - TILE_GAP * (len(card.side) - 1)) // len(card.side)
    return round(max(picture.aspect for picture in card.side) * height), height


class _Flow:
    """Rows of cards, from `left` beside the original (or below it, at the margin) on."""

    def __init__(self, original: Rect, left: int) -> None:
        self._original = original
        self._left = left
        self._y = original[1] if left > MARGIN else original[3] + GAP
        self._row_end: tuple[int, int] | None = None  # left and top of the room for the answer in the last row
        self.placed: list[Placed] = []

    def add_rows(self, cards: Sequence[Card]) -> None:
        rest = list(cards)
        while rest:
            room = self._next_row()
            count = 1
            while count < len(rest) and _tile_height(rest[: count + 1], room) >= _MIN_TILE:
                count += 1
            self._add_row(rest[:count], room, last=count == len(rest))
            rest = rest[count:]

    def answer_rect(self, height_of: Callable[[int], int]) -> Rect:
        right = WIDTH - MARGIN
        if self._row_end is not None:
            left, top = self._row_end
            return left, top, right, top + height_of(right - left)
        fits = self._y + height_of(right - self._left) <= self._original[3] + _MAX_STRETCH
        if not fits:
            self._next_row()
        return self._left, self._y, right, self._y + height_of(right - self._left)

    def _next_row(self) -> int:
        """Moves to where the next row begins; returns its width."""
        if self._left > MARGIN and self._y > self._original[3] - _MIN_BESIDE:
            self._left, self._y = MARGIN, max(self._y, self._original[3] + GAP)
        return WIDTH - MARGIN - self._left

    def _add_row(self, row: Sequence[Card], room: int, last: bool) -> None:
        tile = min(_tile_height(row, room), _MAX_TILE_BESIDE if self._left > MARGIN else _MAX_TILE)
        left_over = room - sum(_card_width(card, tile) for card in row) - GAP * (len(row) - 1)
        with_answer = last and left_over - GAP >= _MIN_ANSWER
        spare = 0 if with_answer else max(0, left_over // len(row))
        x, bottom = self._left, 0
        for card in row:
            extent = _card_width(card, tile) + spare
            thought = wrap(f"“{card.thought}”", THOUGHT, extent - 2 * PAD, _THOUGHT_LINES) if card.thought else []
            caption = (LEGEND if card.composite else 0) + len(thought) * leading(THOUGHT)
            rect = (x, self._y, x + extent, self._y + CARD_HEAD + tile + CAPTION_GAP + caption + PAD)
            self.placed.append(Placed(card, rect, tile, spare // len(card.main), tuple(thought)))
            x, bottom = rect[2] + GAP, max(bottom, rect[3])
        self._row_end = (x, self._y) if with_answer else None
        self._y = bottom + GAP


def _tile_height(row: Sequence[Card], room: int) -> int:
    """At which the row's cards fill `room`: their widths are linear in it."""
    base = sum(_card_width(card, 1000) for card in row)
    slope = (base - sum(_card_width(card, 500) for card in row)) / 500
    return max(1, int(1000 + (room - GAP * (len(row) - 1) - base) / slope))


def _card_width(card: Card, tile: int) -> int:
    pictures = sum(main_width(card, tile, i) for i in range(len(card.main))) + TILE_GAP * (len(card.main) - 1)
    side = TILE_GAP + side_size(card, tile)[0] if card.side else 0
    return pictures + side + 2 * PAD
