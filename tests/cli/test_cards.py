"""What each kind of step shows."""

import pytest
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.cli import cards
from tests.cli.inspections import NORMAL, Script, make_truth, make_verdict

REGION = (0.25, 0.25, 0.75, 0.75)


def make_cards(script: Script, verdict: pb.Verdict = NORMAL) -> list[cards.Card]:
    done = script.answer("so", verdict, 0.5)
    return cards.step_cards(done, cards.original_tile(done, script.load, None), script.load)


def test_a_zoom_shows_the_crop_and_where_the_answer_lies_in_it() -> None:
    script = Script()
    shown = Image.new("RGB", (224, 224), "#123456")
    script.crop("look", REGION, shown)
    [card] = make_cards(script, make_verdict("dent", (0.5, 0.5, 0.625, 0.625)))
    assert card.main[0].image is shown
    [frame] = card.main[0].frames
    assert frame.colour == cards.ANSWER_COLOUR
    assert frame.box == pytest.approx((0.5, 0.5, 0.75, 0.75), abs=0.011)  # replies have two decimals
    assert (card.side, card.composite, card.took) == ((), False, "0.15 s")


def test_no_frame_for_an_answer_elsewhere_or_everywhere() -> None:
    for box in ((0.0, 0.0, 0.2, 0.2), (0.7, 0.7, 0.9, 0.9), (0.0, 0.0, 1.0, 1.0)):
        script = Script()
        script.crop("look", REGION)
        assert make_cards(script, make_verdict("dent", box))[0].main[0].frames == ()


def test_a_composite_stands_beside_part_and_normal() -> None:
    script = Script()
    composite = Image.new("RGB", (224, 224), (200, 90, 110))
    script.query("compare", cards.WHOLE, composite)
    script.crop("closer", REGION, composite, exemplar=True)
    whole, closer = make_cards(script)
    assert whole.composite
    assert closer.composite
    assert whole.main[0].image is composite
    assert [tile.label for tile in whole.side] == ["this part", "normal part"]
    part, normal = whole.side
    assert part.image is not None
    assert part.image.size == (400, 400)
    assert normal.image is script.images["file:///normals/1.png"]
    part, normal = closer.side
    assert part.image is not None
    assert part.image.size == (200, 200)
    # Aligned to the region: the composite's own green channel.
    assert normal.image is not None
    assert normal.image.getcolors() == [(224 * 224, 90)]


def test_side_by_side_and_not_aligned() -> None:
    script = Script(view=pb.COMPARISON_VIEW_SIDE_BY_SIDE)
    script.query("compare", REGION)
    script.query("again", cards.WHOLE, registered=False)
    aligned, alone = make_cards(script)
    assert [tile.label for tile in aligned.main] == ["this part", "normal part"]
    assert aligned.main[0].image is not None
    assert aligned.main[0].image.size == (200, 200)
    assert [tile.label for tile in alone.main] == ["this part", "normal part, not aligned"]


def test_pictures_that_are_gone_leave_their_reason() -> None:
    script = Script()
    script.query("compare", cards.WHOLE)
    script.images.clear()
    [card] = make_cards(script)
    assert [tile.image for tile in (*card.main, *card.side)] == [None, None, None]
    assert "is gone" in card.main[0].reason


def test_the_original_has_the_boxes_of_steps_truth_and_answer() -> None:
    script = Script()
    script.crop("look", REGION)
    script.query("compare", cards.WHOLE)
    script.crop("look", (0.0, 0.0, 0.5, 0.5), exemplar=True)
    done = script.answer("so", make_verdict("dent", (0.5, 0.5, 0.75, 0.75)), 0.9)
    tile = cards.original_tile(done, script.load, make_truth("dent", (0.5, 0.5, 0.625, 0.625)))
    # Looking at everything points at nothing: no box for step 2.
    assert [(frame.number, frame.dashed, frame.box) for frame in tile.frames] == [
        (1, False, REGION),
        (3, False, (0.0, 0.0, 0.5, 0.5)),
        (None, True, (0.5, 0.5, 0.625, 0.625)),
        (None, False, (0.5, 0.5, 0.75, 0.75)),
    ]


def test_a_close_up_lies_inside_the_picture_and_holds_the_box() -> None:
    for box in ((0.0, 0.0, 0.1, 0.1), (0.9, 0.95, 1.0, 1.0), (0.1, 0.4, 0.9, 0.5)):
        script = Script(size=(400, 300))
        done = script.answer("so", make_verdict("dent", box), 0.9)
        tile = cards.close_up(cards.original_tile(done, script.load, None), 1.5)
        assert tile is not None
        assert tile.image is not None
        assert tile.image.width <= 400
        assert tile.image.height <= 300
        [frame] = tile.frames
        assert all(-1e-6 <= value <= 1 + 1e-6 for value in frame.box)
    assert cards.close_up(cards.original_tile(Script().answer("so", NORMAL, 0.1), Script().load, None), 1.5) is None
