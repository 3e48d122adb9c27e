"""The paper's rewards on groups that were scored by hand."""

from __future__ import annotations

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.reward.boxes import Region
from services.reward.scoring import score
from tests.reward import trajectories as make
from tests.reward.trajectories import DEFECT, NORMAL

RIGHT, WRONG = make.make_verdict(True, "scratch"), make.make_verdict(False)
TRUTH = make.make_truth(DEFECT, types=["Scratch"])
# IoU with the defect 0.25, 0.5 and 0.8.
QUARTER: Region = (0.3, 0.3, 0.7, 0.7)
HALF: Region = (0.4, 0.4, 0.5, 0.6)
MOST: Region = (0.4, 0.4, 0.6, 0.56)

# Of four members three are right, two compared; calls beyond the first: 0, 1, 2, 0.
GROUP = [
    make.make_trajectory(make.crop(QUARTER), verdict=RIGHT),
    make.make_trajectory(make.crop(MOST), make.query(), verdict=RIGHT),
    make.make_trajectory(make.crop(QUARTER), make.crop(QUARTER), make.query(), verdict=WRONG),
    make.make_trajectory(make.malformed(), verdict=RIGHT),
]


def rewarded(preset: str, group: list[pb.Trajectory], truth: pb.GroundTruth) -> list[dict[str, float]]:
    return [dict(reward.components) for reward in score(group, truth, preset)]


def test_a_group_as_written() -> None:
    # 3 / 4 right; 0.5 (2 / 4 - 1); -0.05 (0 + 1 + 2 + 0) / 4.
    shared = {"outcome": 0.75, "query_rate": -0.25, "calls": -0.0375}
    assert rewarded("paper", GROUP, TRUTH) == [
        pytest.approx({"verdict": 1, "localisation": 0.25, "type": 0.1, **shared}, abs=1e-6),
        pytest.approx({"verdict": 1, "localisation": 1, "type": 0.1, **shared}, abs=1e-6),
        pytest.approx({"verdict": 0, "localisation": 0.25, "type": 0, **shared}, abs=1e-6),
        pytest.approx({"verdict": 0, "localisation": 0, "type": 0.1, **shared}, abs=1e-6),
    ]
    totals = [reward.total for reward in score(GROUP, TRUTH, "paper")]
    assert totals == pytest.approx([1.8125, 2.5625, 0.7125, 0.5625], abs=1e-6)


def test_a_group_as_run() -> None:
    # The first one only cropped: 0.5 (2 / 4 - 1). The third has one call too many. The last called nothing.
    assert rewarded("paper-as-run", GROUP, TRUTH) == [
        pytest.approx({"verdict": 1, "localisation": 0.25, "type": 0.1, "query_rate": -0.25, "calls": 0}, abs=1e-6),
        pytest.approx({"verdict": 1, "localisation": 1, "type": 0.1, "query_rate": 0, "calls": 0}, abs=1e-6),
        pytest.approx({"verdict": 0, "localisation": 0.25, "type": 0, "query_rate": 0, "calls": -0.05}, abs=1e-6),
        pytest.approx({"verdict": -1, "localisation": 0, "type": 0.1, "query_rate": 0, "calls": 0}, abs=1e-6),
    ]


def test_wrong_without_a_query() -> None:
    group = [make.make_trajectory(make.crop(QUARTER), verdict=WRONG), make.make_trajectory(verdict=WRONG)]
    assert [each["query_rate"] for each in rewarded("paper-as-run", group, TRUTH)] == [-0.3, 0]
    assert [each["query_rate"] for each in rewarded("paper", group, TRUTH)] == [-0.5, -0.5]


def test_a_normal_part() -> None:
    group = [
        make.make_trajectory(make.crop(MOST), verdict=WRONG),
        make.make_trajectory(verdict=make.make_verdict(True, "none")),
    ]
    guessed = make.make_truth(DEFECT, anomalous=False)
    for truth, localised in [(NORMAL, 0), (guessed, 1)]:
        as_run = rewarded("paper-as-run", group, truth)
        assert [each["type"] for each in as_run] == [0.1, 0.1]
        assert [each["localisation"] for each in as_run] == [localised, 0]
        assert [each["verdict"] for each in as_run] == [1, 0]
        as_written = rewarded("paper", group, truth)
        assert [each["type"] + each["localisation"] for each in as_written] == [0, 0]


@pytest.mark.parametrize(
    ("crops", "as_written", "as_run"),
    [
        ([HALF], 0.5, 0.5),
        ([MOST], 1, 1),
        # The last crop; their union, which is the defect.
        ([(0.5, 0.4, 0.6, 0.6), HALF], 0.5, 1),
        # The last one misses; of the union 0.02 is right, 0.04 elsewhere, 0.02 missing.
        ([HALF, (0.0, 0.0, 0.2, 0.2)], 0, 0.25),
        ([HALF, HALF], 0.5, 0.5),
        ([], 0, 0),
    ],
)
def test_localisation(crops: list[Region], as_written: float, as_run: float) -> None:
    group = [make.make_trajectory(*map(make.crop, crops), verdict=RIGHT)]
    for preset, expected in [("paper", as_written), ("paper-as-run", as_run)]:
        localised = rewarded(preset, group, TRUTH)[0]["localisation"]
        assert localised == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("trajectory", "as_written", "as_run"),
    [
        (make.make_trajectory(verdict=RIGHT), 1, 1),
        (make.make_trajectory(verdict=WRONG), 0, 0),
        (make.make_trajectory(verdict=RIGHT, stop=pb.STOP_REASON_LIMIT), 0, -1),
        (make.make_trajectory(verdict=RIGHT, stop=pb.STOP_REASON_MALFORMED), 0, -1),
        (make.make_trajectory(make.malformed(), verdict=RIGHT), 0, -1),
        (make.make_trajectory(make.crop(DEFECT, error=make.NO_CALLS_LEFT), verdict=RIGHT), 1, 1),
        (make.make_trajectory(stop=pb.STOP_REASON_LATENCY_BUDGET), 0, -1),
    ],
)
def test_verdict(trajectory: pb.Trajectory, as_written: float, as_run: float) -> None:
    assert rewarded("paper", [trajectory], TRUTH)[0]["verdict"] == as_written
    assert rewarded("paper-as-run", [trajectory], TRUTH)[0]["verdict"] == as_run


@pytest.mark.parametrize(("calls", "as_written", "as_run"), [(0, 0, 0), (1, 0, 0), (2, -0.05, 0), (4, -0.15, -0.1)])
def test_calls(calls: int, as_written: float, as_run: float) -> None:
    group = [make.make_trajectory(*[make.query()] * calls, verdict=RIGHT)]
    assert rewarded("paper", group, TRUTH)[0]["calls"] == pytest.approx(as_written)
    assert rewarded("paper-as-run", group, TRUTH)[0]["calls"] == pytest.approx(as_run)


@pytest.mark.parametrize(("kind", "expected"), [("SCRATCH", 0.1), ("scratches", 0), ("", 0)])
def test_the_type_must_be_the_same(kind: str, expected: float) -> None:
    group = [make.make_trajectory(verdict=make.make_verdict(True, kind))]
    truth = make.make_truth(types=["scratch", ""])
    for preset in ("paper", "paper-as-run"):
        assert rewarded(preset, group, truth)[0]["type"] == expected
