"""The evidence picture: every step is on it, and no inspection is too strange for it."""

import math

import pytest
from PIL import Image, ImageColor

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import episode, protocol
from services.cli import layout
from services.cli.cards import ANSWER_COLOUR, WHOLE, step_colour
from services.cli.evidence import DECISION_COLOURS, evidence
from tests.cli.inspections import NORMAL, Script, make_truth, make_verdict


def count(picture: Image.Image, colour: str) -> int:
    wanted = ImageColor.getrgb(colour)
    return sum(times for times, seen in picture.getcolors(picture.width * picture.height) or [] if seen == wanted)


def test_every_step_is_shown_with_its_picture_number_and_box() -> None:
    script = Script()
    colours = ["#01FF02", "#03FF04", "#05FF06"]
    for i, colour in enumerate(colours):
        box = (0.1 + 0.2 * i, 0.1, 0.3 + 0.2 * i, 0.4)
        script.crop(f"step {i}", box, Image.new("RGB", (224, 224), colour))
    picture = evidence(script.answer("so", NORMAL, 0.1), script.load)
    assert picture.width == layout.WIDTH
    for i, colour in enumerate(colours):
        assert count(picture, colour) > 40_000, colour
        # A frame on the original and a badge on the card.
        assert count(picture, step_colour(i + 1)) > 1_000, i


def test_boxes_lie_where_they_point_on_the_original() -> None:
    script = Script()
    done = script.answer("so", make_verdict("dent", (0.5, 0.25, 0.75, 0.5)), 0.9)
    picture = evidence(done, script.load)
    places = layout.arrange((400, 400), [], lambda _: 100)
    left, top = places.original[0] + layout.PAD, places.original[1] + layout.CARD_HEAD
    side = places.picture[0]
    red = ImageColor.getrgb(ANSWER_COLOUR)
    assert picture.getpixel((left + side // 2 - 2, top + round(side * 0.4))) == red
    assert picture.getpixel((left + round(side * 0.6), top + side // 4 - 2)) == red
    assert picture.getpixel((left + round(side * 0.6), top + round(side * 0.4))) == ImageColor.getrgb("#808080")


@pytest.mark.parametrize(("probability", "decision"), [(0.1, "pass"), (0.9, "reject"), (0.52, "review")])
def test_the_decision_has_its_colour(probability: float, decision: str) -> None:
    script = Script()
    script.answer("so", NORMAL, probability)
    picture = evidence(script.inspection(review_band=0.1), script.load)
    assert picture.getpixel((5, 5)) == ImageColor.getrgb(DECISION_COLOURS[decision])
    assert count(picture, DECISION_COLOURS[decision]) > 30_000


def test_a_comparison_shows_composite_part_and_normal() -> None:
    script = Script()
    script.query("compare", WHOLE, Image.new("RGB", (224, 224), "#C0C01F"))
    picture = evidence(script.answer("so", NORMAL, 0.1), script.load)
    assert count(picture, "#C0C01F") > 100_000
    assert count(picture, "#00A0A0") > 20_000  # the exemplar


def test_truth_and_an_unknown_category_are_marked() -> None:
    script = Script(known=False)
    done = script.answer("so", NORMAL, 0.1)
    plain, told = evidence(done, script.load), evidence(done, script.load, make_truth("dent", (0.1, 0.1, 0.3, 0.3)))
    assert count(plain, "#DC2626") > 2_000  # the chip
    assert plain.tobytes() != told.tobytes()


@pytest.mark.parametrize("size", [(1, 1), (40, 32), (100, 1900), (1900, 100), (3, 20_000), (20_000, 3), (4_000, 3_000)])
@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_any_size_and_any_number_of_steps(size: tuple[int, int], steps: int) -> None:
    script = Script(size=size)
    for i in range(steps):
        if i % 3 == 1:
            script.query("compare " * i, WHOLE, registered=i % 2 == 0)
        else:
            script.crop("look " * 40 * i, (0.1, 0.1, 0.2, 0.2), Image.new("RGB", (224, 50 + 100 * i)))
    done = script.answer("so", make_verdict("dent", (0.4, 0.4, 0.41, 0.41), *["mark"] * 9), 0.9)
    picture = evidence(done, script.load, make_truth("dent", (0.4, 0.4, 0.41, 0.41)))
    assert picture.width == layout.WIDTH
    assert picture.height < 6_000


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_any_mode(mode: str) -> None:
    script = Script()
    script.images["file:///parts/part.png"] = Image.new(mode, (300, 200))
    script.crop("look", (0.1, 0.1, 0.5, 0.5), Image.new(mode, (50, 50)))
    script.query("compare", WHOLE)
    assert evidence(script.answer("so", make_verdict("dent", (0.4, 0.4, 0.5, 0.5)), 0.9), script.load).mode == "RGB"


def test_nothing_can_be_read() -> None:
    script = Script()
    script.crop("look", (0.1, 0.1, 0.5, 0.5))
    done = script.answer("so", make_verdict("dent", (0.4, 0.4, 0.5, 0.5)), 0.9)
    assert evidence(done, Script().load).size == evidence(done, script.load).size
    script.images.clear()
    assert evidence(done, script.load).width == layout.WIDTH


def test_an_empty_inspection() -> None:
    assert evidence(events_pb2.InspectionCompleted(), Script().load).width == layout.WIDTH


def test_unfinished_malformed_and_forced_episodes() -> None:
    late = Script()
    late.say(protocol.crop_reply("look", (0.1, 0.1, 0.5, 0.5)))
    episode.out_of_time(late.trajectory)
    evidence(late.inspection(), late.load)
    forced = Script(max_turns=2)
    forced.say("no idea")
    forced.say("{" * 10_000)
    forced.say("not json", 0.7)
    assert forced.trajectory.stop_reason == pb.STOP_REASON_MALFORMED
    evidence(forced.inspection(), forced.load)


def test_hostile_words_and_numbers() -> None:
    script = Script(category="<b>\x00\u202e" * 40, name="%00%2F" * 90)
    script.crop("W" * 5_000, (0.1, 0.1, 0.5, 0.5))
    done = script.answer("日本語 " * 900, make_verdict("x" * 9_000, (0.1, 0.1, 0.2, 0.2), "y" * 9_000), 0.9)
    done.raw_score, done.threshold, done.review_band = math.nan, math.inf, -math.inf
    done.policy_version = "v" * 10_000
    done.verdict.box.x_max = math.nan
    for turn in done.trajectory.turns:
        if turn.HasField("observation"):
            turn.observation.region.x_min = math.nan
    picture = evidence(done, script.load, make_truth("z" * 9_000, (math.nan, 0, 1, math.inf)))
    assert picture.width == layout.WIDTH
