"""What is read of records: those that the agent's own state machine writes, and broken ones."""

from __future__ import annotations

from datetime import timedelta

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import episode, protocol
from services.reward import reading
from services.reward.boxes import Region
from services.reward.reading import Outcome, read
from tests.reward import trajectories as make
from tests.reward.trajectories import DEFECT, WHOLE

REGION: Region = (0.2, 0.4, 0.6, 0.8)


def play(*replies: str, observations: list[pb.Observation], max_tool_calls: int = 3) -> pb.Trajectory:
    """An episode by the agent's state machine, with what its tools answer."""
    limits = pb.Limits(max_turns=4, max_tool_calls=max_tool_calls)
    trajectory = episode.begin("e", pb.Task(category="bolt"), limits, pb.Sampling(), PolicyCard())
    answers = iter(observations)
    for reply in replies:
        episode.add_generation(trajectory, pb.Generation(text=reply), timedelta())
        if isinstance(episode.next_step(trajectory), episode.CropStep | episode.QueryStep):
            episode.add_observation(trajectory, next(answers), timedelta())
    return trajectory


def shown(region: Region) -> pb.Observation:
    return pb.Observation(image=pb.ImageReference(uri="file:///x.png"), region=make.make_box(region))


ANSWER = protocol.answer_reply("", make.make_verdict(True, "scratch", DEFECT))


def test_the_agents_names_are_ours() -> None:
    assert (reading.CROP, reading.QUERY) == (protocol.CROP, protocol.QUERY)


def test_an_episode_that_went_well() -> None:
    """The second crop is of the first's picture, so its box lies in the original as the agent would cut it."""
    behaviour = read(
        play(
            protocol.crop_reply("", (0.3, 0.5, 0.5, 0.7)),
            protocol.query_reply(""),
            protocol.crop_reply("", (0.5, 0.0, 1.0, 0.5), target_image=2),
            ANSWER,
            observations=[shown(REGION), shown(WHOLE), shown(DEFECT)],
        )
    )
    assert [call.name for call in behaviour.calls] == [protocol.CROP, protocol.QUERY, protocol.CROP]
    assert {call.outcome for call in behaviour.calls} == {Outcome.SHOWN}
    assert behaviour.shown_crops[0] == (0.3, 0.5, 0.5, 0.7)
    assert behaviour.shown_crops[1] == pytest.approx((0.4, 0.4, 0.6, 0.6))
    assert behaviour.answered
    assert not behaviour.forced
    assert behaviour.malformed == 0
    assert behaviour.verdict == make.make_verdict(True, "scratch", DEFECT)


def test_an_episode_full_of_faults() -> None:
    trajectory = play(
        "hm",
        protocol.crop_reply("", DEFECT, target_image=7),
        protocol.query_reply(""),
        protocol.crop_reply("", DEFECT),
        'true,"top_anomaly":"scratch"}</answer>',
        observations=[pb.Observation(tool_error=make.NO_EXEMPLAR)],
        max_tool_calls=2,
    )
    behaviour = read(trajectory)
    assert behaviour.malformed == 1
    assert [call.outcome for call in behaviour.calls] == [Outcome.REFUSED, Outcome.UNAVAILABLE, Outcome.REFUSED]
    assert behaviour.shown_crops == []
    assert behaviour.forced
    assert not behaviour.answered
    assert behaviour.verdict is not None
    assert behaviour.verdict.anomaly_present


def test_zooms_own_errors() -> None:
    too_small = make.crop(DEFECT, error="The region is only 12 pixels on its shorter side and 28 are needed")
    unreadable = make.query(error="The normal image cannot be read.")
    calls = read(make.make_trajectory(too_small, unreadable)).calls
    assert [call.outcome for call in calls] == [Outcome.REFUSED, Outcome.UNAVAILABLE]


def test_an_unfinished_episode() -> None:
    turn, _ = make.crop(DEFECT)
    behaviour = read(pb.Trajectory(turns=[turn]))
    assert behaviour.calls[0].outcome is Outcome.UNAVAILABLE
    assert behaviour.verdict is None
    assert not behaviour.answered
    assert not behaviour.forced


@pytest.mark.parametrize(("probe", "expected"), [(None, None), (0.25, 0.25), (0, 0), (1, 1), (1.5, None), (-1, None),
                                                 (float("nan"), None), (float("inf"), None)])  # fmt: skip
def test_probes(probe: float | None, expected: float | None) -> None:
    assert read(make.make_trajectory(make.query(probe=probe))).calls[0].probe == expected


@pytest.mark.parametrize(
    "arguments",
    ["", "[]", "{}", "[" * 100_000, '{"bbox_2d":[0.1,0.1,0.2]}', '{"bbox_2d":[0.1,0.1,0.2,"0.2"]}',
     '{"bbox_2d":[NaN,0,1,1]}', '{"bbox_2d":[0,0,1e999,1]}', f'{{"bbox_2d":[0,0,1{"0" * 400},1]}}',
     '{"bbox_2d":[0.5,0.5,0.5,0.6]}', '{"bbox_2d":[false,false,true,true]}',
     '{"bbox_2d":[0,0,1,1],"target_image":2}', '{"bbox_2d":[0,0,1,1],"target_image":0}',
     '{"bbox_2d":[0,0,1,1],"target_image":true}', '{"bbox_2d":[0,0,1,1],"target_image":1.0}'],
)  # fmt: skip
def test_a_crop_that_cannot_be_placed_is_absent(arguments: str) -> None:
    step = make.call(pb.ToolCall(name=reading.CROP, arguments_json=arguments))
    behaviour = read(make.make_trajectory(step))
    assert behaviour.calls[0].box is None
    assert behaviour.shown_crops == []


def test_a_crop_of_a_picture_of_nowhere_is_absent() -> None:
    nowhere = (float("nan"), 0.0, 1.0, 1.0)
    trajectory = make.make_trajectory(make.crop(DEFECT, region=nowhere), make.crop(WHOLE, target=2), make.crop(WHOLE))
    assert [call.box for call in read(trajectory).calls] == [pytest.approx(DEFECT), None, WHOLE]


def test_a_truth_keeps_what_is_known() -> None:
    truth = make.make_truth(DEFECT, (0.5, 0.5, 0.5, 0.5), types=["dent", "bent", "dent"])
    read_back = reading.read_truth(truth)
    (box,) = read_back.boxes
    assert box == pytest.approx(DEFECT)
    assert read_back.types == ("", "bent", "dent")
