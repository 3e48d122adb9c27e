"""Areas by hand, and what holds for any box."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentiad.v1 import trajectory_pb2 as pb
from services.reward import boxes
from services.reward.boxes import Region
from tests.reward.strategies import PATIENT, regions, weird_boxes
from tests.reward.trajectories import DEFECT, WHOLE

LEFT, TOP = (0.0, 0.0, 0.5, 1.0), (0.0, 0.0, 1.0, 0.5)


@pytest.mark.parametrize(
    ("shape", "box", "expected"),
    [
        ([], WHOLE, 0),
        ([LEFT], LEFT, 1),
        ([LEFT], TOP, 0.25 / 0.75),
        ([LEFT, TOP], WHOLE, 0.75),
        ([LEFT, LEFT], WHOLE, 0.5),
        ([LEFT, (0.25, 0.25, 0.75, 0.75)], WHOLE, 0.625),
        ([(0.0, 0.0, 0.1, 0.1)], (0.9, 0.9, 1.0, 1.0), 0),
        ([(0.0, 0.0, 0.25, 0.25), (0.75, 0.75, 1.0, 1.0)], LEFT, 0.0625 / 0.5625),
    ],
)
def test_iou(shape: list[Region], box: Region, expected: float) -> None:
    assert boxes.iou(shape, box) == pytest.approx(expected)


def test_covered() -> None:
    assert boxes.covered(DEFECT, by=WHOLE) == 1
    assert boxes.covered(DEFECT, by=LEFT) == pytest.approx(0.5)
    assert boxes.covered(DEFECT, by=(0.7, 0.7, 0.8, 0.8)) == 0


def test_a_box_grows_as_far_as_the_image_goes() -> None:
    assert boxes.grown(DEFECT, 0.1) == pytest.approx((0.3, 0.3, 0.7, 0.7))
    assert boxes.grown((0.0, 0.05, 0.2, 0.95), 0.1) == pytest.approx((0, 0, 0.3, 1))


def test_a_box_within_a_picture() -> None:
    assert boxes.within((0.5, 0.0, 1.0, 0.5), (0.2, 0.4, 0.6, 0.8)) == pytest.approx((0.4, 0.4, 0.6, 0.6))
    assert boxes.within(DEFECT, WHOLE) == DEFECT


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((-1, -1, 2, 0.5), (0, 0, 1, 0.5)),
        ((0.5, 0.5, 0.5, 0.6), None),
        ((0.6, 0.6, 0.4, 0.4), None),
        ((1.5, 0, 2, 1), None),
        ((math.nan, 0, 1, 1), None),
        ((0, 0, math.inf, 1), None),
        ((0, 0, 1e-200, 1e-200), None),
    ],
)
def test_what_lies_in_the_image(box: Region, expected: Region | None) -> None:
    assert boxes.region(*box) == expected


def test_an_absent_box_is_none() -> None:
    assert boxes.region_of(pb.Verdict().box) is None


@PATIENT
@given(st.lists(weird_boxes, max_size=5), weird_boxes)
def test_ratios_lie_between_0_and_1(shape: list[pb.Box], box: pb.Box) -> None:
    pieces = [piece for piece in map(boxes.region_of, shape) if piece]
    target = boxes.region_of(box) or WHOLE
    assert 0 <= boxes.iou(pieces, target) <= 1
    assert all(0 <= boxes.covered(target, piece) <= 1 for piece in pieces)


@PATIENT
@given(st.lists(regions, max_size=4), regions)
def test_the_union_is_the_same_in_any_order_and_with_doubles(shape: list[Region], box: Region) -> None:
    assert boxes.iou(shape[::-1] + shape, box) == pytest.approx(boxes.iou(shape, box))


@PATIENT
@given(regions, regions)
def test_iou_goes_both_ways(one: Region, other: Region) -> None:
    assert boxes.iou([one], other) == pytest.approx(boxes.iou([other], one))
