"""The default reward: its formulas by hand, and what no policy may gain by."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from agentiad.v1 import trajectory_pb2 as pb
from services.reward import boxes
from services.reward.boxes import Region
from services.reward.scoring import score
from tests.reward import trajectories as make
from tests.reward.strategies import PATIENT, regions, trajectories, truths
from tests.reward.trajectories import AROUND_DEFECT, DEFECT, NORMAL, WHOLE

LIMIT, MALFORMED = pb.STOP_REASON_LIMIT, pb.STOP_REASON_MALFORMED
TRUTH = make.make_truth(DEFECT, types=["scratch"])
RIGHT, WRONG = make.make_verdict(True), make.make_verdict(False)


def rewarded(trajectory: pb.Trajectory, truth: pb.GroundTruth = TRUTH) -> dict[str, float]:
    return dict(score([trajectory], truth, "gated")[0].components)


def localisation(trajectory: pb.Trajectory, truth: pb.GroundTruth = TRUTH) -> float:
    """Of both kinds of evidence."""
    components = rewarded(trajectory, truth)
    return components["crop"] + components["box"]


def total(trajectory: pb.Trajectory, truth: pb.GroundTruth = TRUTH) -> float:
    return score([trajectory], truth, "gated")[0].total


@pytest.mark.parametrize(
    ("verdict", "truth", "expected"),
    [(RIGHT, TRUTH, 1), (WRONG, TRUTH, 0), (None, TRUTH, 0), (RIGHT, NORMAL, 0), (WRONG, NORMAL, 1), (None, NORMAL, 0)],
)
def test_verdict(verdict: pb.Verdict | None, truth: pb.GroundTruth, expected: float) -> None:
    assert rewarded(make.make_trajectory(verdict=verdict), truth)["verdict"] == expected


@pytest.mark.parametrize(
    ("crop", "answer", "expected"),
    [
        (None, None, 0),
        (AROUND_DEFECT, None, 0.25),
        (DEFECT, DEFECT, 0.5),
        (None, DEFECT, 0.25),
        # Half of the defect, and half of it as the answer.
        ((0.4, 0.4, 0.5, 0.6), (0.4, 0.4, 0.5, 0.6), 0.25),
        # All of it in a crop of 0.64, where 0.16 would do; IoU 0.04 / 0.64.
        ((0.1, 0.1, 0.9, 0.9), (0.1, 0.1, 0.9, 0.9), 0.25 * (0.16 / 0.64) + 0.25 * (0.04 / 0.64)),
        (WHOLE, WHOLE, 0.25 * 0.16 + 0.25 * 0.04),
        ((0.7, 0.7, 0.9, 0.9), (0.0, 0.0, 0.1, 0.1), 0),
    ],
)
def test_localisation(crop: Region | None, answer: Region | None, expected: float) -> None:
    steps = [make.crop(crop)] if crop else []
    trajectory = make.make_trajectory(*steps, verdict=make.make_verdict(True, box=answer))
    assert localisation(trajectory) == pytest.approx(expected, abs=1e-6)
    trajectory.verdict.anomaly_present = False
    assert localisation(trajectory) == 0


def test_only_the_last_crop_that_was_shown_counts() -> None:
    away = (0.8, 0.8, 0.9, 0.9)
    refused = make.crop(DEFECT, error=make.NO_CALLS_LEFT)
    for expected, crops in [(0.25, [away, DEFECT]), (0, [DEFECT, away])]:
        trajectory = make.make_trajectory(*map(make.crop, crops), refused, verdict=RIGHT)
        assert localisation(trajectory) == pytest.approx(expected)


def test_the_best_defect_counts() -> None:
    other = (0.8, 0.8, 0.9, 0.9)
    truth = make.make_truth(other, DEFECT)
    trajectory = make.make_trajectory(make.crop(DEFECT), verdict=make.make_verdict(True, box=other))
    assert localisation(trajectory, truth) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("kind", "expected"), [("Scratch", 0.2), ("dent", 0), ("", 0), ("scratches", 0.2 * 0.8 * 2 * 7 / 18)]
)
def test_type(kind: str, expected: float) -> None:
    trajectory = make.make_trajectory(verdict=make.make_verdict(True, kind))
    assert rewarded(trajectory)["type"] == pytest.approx(expected)
    assert rewarded(trajectory, make.make_truth())["type"] == 0


@pytest.mark.parametrize(
    ("steps", "stop", "expected"),
    [
        ([], pb.STOP_REASON_ANSWERED, 0),
        ([make.malformed()], pb.STOP_REASON_ANSWERED, -0.25),
        ([make.crop(DEFECT, error=make.NO_CALLS_LEFT)], pb.STOP_REASON_ANSWERED, -0.25),
        ([make.query(error=make.NO_EXEMPLAR)], pb.STOP_REASON_ANSWERED, 0),
        ([], LIMIT, -0.25),
        ([], pb.STOP_REASON_LATENCY_BUDGET, 0),
        ([make.malformed()], MALFORMED, -0.5),
        ([make.malformed()] * 5, MALFORMED, -0.5),
    ],
)
def test_format(steps: list[make.Step], stop: pb.StopReason.ValueType, expected: float) -> None:
    assert rewarded(make.make_trajectory(*steps, verdict=RIGHT, stop=stop))["format"] == expected
    assert rewarded(make.make_trajectory(*steps, verdict=WRONG, stop=stop))["format"] == expected


@pytest.mark.parametrize(
    ("probes", "verdict", "expected"),
    [
        ([], RIGHT, 0),
        ([None, None], RIGHT, 0),
        ([0.1], RIGHT, 0.2),
        ([0.1], WRONG, -0.02),
        ([0.9], RIGHT, -0.1),
        ([0.6], RIGHT, 0.2),
        ([0.75], RIGHT, -0.1),
        ([0.25], RIGHT, 0.2),
        ([0.1, 0.3], RIGHT, 0.2),
        ([0.1, 0.9], RIGHT, 0.1),
        ([0.9, 0.9, None], WRONG, -0.2),
        ([0.9] * 20, RIGHT, -0.4),
    ],
)
def test_tools(probes: list[float | None], verdict: pb.Verdict, expected: float) -> None:
    trajectory = make.make_trajectory(*(make.query(probe=probe) for probe in probes), verdict=verdict)
    assert rewarded(trajectory)["tools"] == pytest.approx(expected)


def test_a_normal_part_is_unsure_in_the_same_band() -> None:
    for probe, expected in [(0.24, -0.1), (0.3, 0.2), (0.7, 0.2), (0.9, 0.2)]:
        trajectory = make.make_trajectory(make.query(probe=probe), verdict=WRONG)
        assert rewarded(trajectory, NORMAL)["tools"] == pytest.approx(expected)


def test_a_call_that_showed_nothing_cannot_have_helped() -> None:
    refused = make.make_trajectory(make.crop(DEFECT, error=make.NO_CALLS_LEFT, probe=0.1), verdict=RIGHT)
    assert rewarded(refused)["tools"] == pytest.approx(-0.02)
    honest = make.make_trajectory(make.query(error=make.NO_EXEMPLAR, probe=0.1), verdict=RIGHT)
    assert rewarded(honest)["tools"] == 0


@PATIENT
@given(trajectories(), truths())
def test_the_total_is_bounded(trajectory: pb.Trajectory, truth: pb.GroundTruth) -> None:
    assert -0.9 - 1e-9 <= total(trajectory, truth) <= 1.9 + 1e-9


@PATIENT
@given(trajectories(), trajectories(), truths())
def test_any_right_verdict_beats_any_wrong_one(one: pb.Trajectory, other: pb.Trajectory, truth: pb.GroundTruth) -> None:
    """The same behaviour's, too: the second may be a copy of the first."""
    one.verdict.anomaly_present = truth.anomaly_present
    for wrong in (other, pb.Trajectory.FromString(one.SerializeToString())):
        wrong.verdict.anomaly_present = not truth.anomaly_present
        assert total(one, truth) >= total(wrong, truth) + 0.09


@PATIENT
@given(regions, regions, regions)
def test_a_box_that_overlaps_more_is_worth_more(defect: Region, one: Region, other: Region) -> None:
    truth = make.make_truth(defect)
    less, more = sorted((one, other), key=lambda box: boxes.iou([box], defect))
    assume(boxes.iou([more], defect) > boxes.iou([less], defect) + 1e-4)
    worth = [total(make.make_trajectory(verdict=make.make_verdict(True, box=box)), truth) for box in (less, more)]
    assert worth[0] < worth[1]


@PATIENT
@given(regions, st.floats(0.05, 0.5), regions)
def test_a_crop_that_covers_more_is_worth_more(defect: Region, share: float, around: Region) -> None:
    """Parts of the defect: the same crop, cut off to the right. None is too large, so that coverage alone counts."""
    truth, (left, top, right, bottom) = make.make_truth(defect), defect
    parts = [(left, top, left + (right - left) * much, bottom) for much in (share, share + 0.4)]
    worth = [total(make.make_trajectory(make.crop(part), verdict=RIGHT), truth) for part in parts]
    assert worth[0] < worth[1]
    assert total(make.make_trajectory(make.crop(around), verdict=RIGHT), truth) <= 1.25 + 1e-6


@PATIENT
@given(regions, regions, st.floats(0.01, 0.3))
def test_a_larger_crop_is_never_worth_more_once_it_shows_the_defect(
    defect: Region, extra: Region, margin: float
) -> None:
    truth = make.make_truth(defect)
    around = boxes.grown(defect, margin)
    larger = (min(around[0], extra[0]), min(around[1], extra[1]), max(around[2], extra[2]), max(around[3], extra[3]))
    worth = [total(make.make_trajectory(make.crop(box), verdict=RIGHT), truth) for box in (defect, around, larger)]
    # A message keeps the defect's box to seven digits.
    assert worth[0] >= worth[1] - 1e-5 >= worth[2] - 2e-5


@PATIENT
@given(regions)
def test_the_whole_image_is_no_place(defect: Region) -> None:
    """To crop and to point at everything gets at most the share of the image that the defect needs."""
    trajectory = make.make_trajectory(make.crop(WHOLE), verdict=make.make_verdict(True, box=WHOLE))
    needed = boxes.area(boxes.grown(defect, 0.1))
    assert localisation(trajectory, make.make_truth(defect)) <= 0.5 * needed + 1e-6


@PATIENT
@given(trajectories(), truths(), st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=1, max_size=2))
def test_to_call_everything_loses(trajectory: pb.Trajectory, truth: pb.GroundTruth, probes: list[float]) -> None:
    """More calls, made when the policy already knows, or in an episode that ends wrong."""
    right = trajectory.HasField("verdict") and trajectory.verdict.anomaly_present == truth.anomaly_present
    more = pb.Trajectory.FromString(trajectory.SerializeToString())
    for probe in probes:
        more.turns.extend(make.query(probe=float(truth.anomaly_present) if right else probe))
    bound = [pytest.approx(-0.4), pytest.approx(0.2 - 0.4)]
    assume(rewarded(more, truth)["tools"] not in bound)  # calls beyond it cost nothing more
    lost = total(trajectory, truth) - total(more, truth)
    assert 0.02 * len(probes) - 1e-9 <= lost <= 0.1 * len(probes) + 1e-9
    if right:
        assert lost == pytest.approx(0.1 * len(probes))


@PATIENT
@given(st.booleans(), st.floats(0, 1, width=32), st.lists(st.floats(0, 1, width=32), max_size=2))
def test_never_to_call_loses_where_calls_help(anomalous: bool, first: float, later: list[float]) -> None:
    """The first look is wrong: who calls and gets it right has more than who answers at once."""
    assume((first >= 0.5) != anomalous)
    truth = make.make_truth(anomalous=anomalous)
    at_once = make.make_trajectory(verdict=make.make_verdict(not anomalous))
    calls = [make.query(probe=probe) for probe in (first, *later)]
    looked = make.make_trajectory(*calls, verdict=make.make_verdict(anomalous))
    assert total(looked, truth) >= 1.0 - 1e-9 > 0 == total(at_once, truth)


@PATIENT
@given(trajectories(), truths(), st.integers(1, 3))
def test_malformed_replies_never_gain(trajectory: pb.Trajectory, truth: pb.GroundTruth, count: int) -> None:
    worse = pb.Trajectory.FromString(trajectory.SerializeToString())
    for _ in range(count):
        worse.turns.extend(make.malformed())
    before, after = rewarded(trajectory, truth), rewarded(worse, truth)
    assert after.pop("format") == max(-0.5, before.pop("format") - 0.25 * count)
    assert after == before
