import random

import pytest

from services.chassis.bus.watermark import Watermark


def make_watermark(*offsets: int) -> Watermark:
    watermark = Watermark()
    for offset in offsets:
        watermark.start(offset)
    return watermark


def test_nothing_started() -> None:
    assert Watermark().position is None


def test_position_is_the_lowest_unfinished_offset() -> None:
    watermark = make_watermark(5, 6, 7)
    watermark.done(6)
    watermark.done(7)
    assert watermark.position == 5
    watermark.done(5)
    assert watermark.position == 8


def test_gaps_are_legal() -> None:
    watermark = make_watermark(3, 9, 40)
    watermark.done(3)
    assert watermark.position == 9
    watermark.done(9)
    watermark.done(40)
    assert watermark.position == 41


def test_offsets_must_rise() -> None:
    with pytest.raises(ValueError, match="started after"):
        make_watermark(5, 5)


@pytest.mark.parametrize("seed", range(20))
def test_any_order(seed: int) -> None:
    """Against the definition: the first offset that is not done."""
    chance = random.Random(seed)
    offsets = sorted(chance.sample(range(1000), 50))
    watermark, unfinished = make_watermark(*offsets), set(offsets)
    for offset in chance.sample(offsets, 50):
        watermark.done(offset)
        unfinished.discard(offset)
        assert watermark.position == min(unfinished, default=offsets[-1] + 1)
