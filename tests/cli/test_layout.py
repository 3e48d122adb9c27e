"""Nothing overlaps, nothing leaves the page, whatever is to be arranged."""

import itertools

import pytest
from PIL import Image

from services.cli import layout
from services.cli.cards import Card, Tile

SQUARE = Tile(Image.new("RGB", (224, 224)), "")
TALL = Tile(Image.new("RGB", (20, 900)), "")
WIDE = Tile(Image.new("RGB", (900, 20)), "")
REASON = Tile(None, "", "it is gone")


def make_card(number: int, kind: int) -> Card:
    main: tuple[Tile, ...] = ((SQUARE,), (TALL,), (WIDE,), (REASON,), (SQUARE, SQUARE), (SQUARE,))[kind % 6]
    side = (SQUARE, WIDE) if kind % 6 == 5 else ()
    thought = "why I look here " * (kind % 5)
    return Card(number, "#000000", "Look closer", "0.1 s", thought, main, side, bool(side))


@pytest.mark.parametrize("count", range(10))
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("size", [(384, 384), (100, 1900), (1900, 100), (1, 1), (1, 20_000), (20_000, 1), (700, 400)])
def test_everything_has_its_own_place(size: tuple[int, int], first: int, count: int) -> None:
    cards = [make_card(number, first + number) for number in range(count)]
    places = layout.arrange(size, cards, lambda width: 40_000 // width + 100)
    assert [placed.card for placed in places.cards] == cards
    rects = [places.original, places.answer, *(placed.rect for placed in places.cards)]
    for left, top, right, bottom in rects:
        assert layout.MARGIN <= left < right <= layout.WIDTH - layout.MARGIN
        assert layout.HEADER <= top < bottom <= places.height - layout.MARGIN
    for a, b in itertools.combinations(rects, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)


def test_a_card_holds_its_pictures() -> None:
    cards = [make_card(number, number) for number in range(6)]
    for placed in layout.arrange((384, 384), cards, lambda _: 200).cards:
        card = placed.card
        used = sum(layout.main_width(card, placed.tile, i) + placed.spare for i in range(len(card.main)))
        used += layout.TILE_GAP * (len(card.main) - 1)
        if card.side:
            used += layout.TILE_GAP + layout.side_size(card, placed.tile)[0]
        assert used + 2 * layout.PAD <= placed.rect[2] - placed.rect[0] + 1
