"""The state machine, driven by hand: what follows what, and how every episode ends."""

from datetime import timedelta

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import episode, protocol

LATENCY = timedelta(milliseconds=5)
PART = pb.ImageReference(uri="file:///part.png", sha256="a" * 64, width=384, height=384)
CROP = pb.ImageReference(uri="file:///crop.png", sha256="b" * 64)
EXEMPLAR = pb.ImageReference(uri="file:///exemplar.png", sha256="c" * 64)


def make_trajectory(
    view: "pb.ComparisonView.ValueType" = pb.COMPARISON_VIEW_COMPOSITE, max_turns: int = 5, max_tool_calls: int = 3
) -> pb.Trajectory:
    return episode.begin(
        "e1",
        pb.Task(image=pb.Image(reference=PART), category="bolt"),
        pb.Limits(max_turns=max_turns, max_tool_calls=max_tool_calls, max_new_tokens=64),
        pb.Sampling(seed=7),
        PolicyCard(version="v1", categories=["bolt"], comparison_view=view),
    )


def say(trajectory: pb.Trajectory, text: str, probability: float | None = None) -> None:
    generation = pb.Generation(token_ids=[1, 2, 3], log_probabilities=[-0.1] * 3, text=text, policy_version="v1")
    if probability is not None:
        generation.anomaly_probability = probability
    episode.add_generation(trajectory, generation, LATENCY)


def show(
    trajectory: pb.Trajectory, x_min: float, x_max: float, exemplar: bool = False, registered: bool = True
) -> None:
    observation = pb.Observation(image=CROP, region=pb.Box(x_min=x_min, y_min=0, x_max=x_max, y_max=1))
    if exemplar:
        observation.exemplar.CopyFrom(EXEMPLAR)
        observation.registered = registered
    episode.add_observation(trajectory, observation, LATENCY)


def answer(present: bool = True) -> str:
    return protocol.answer_reply("so", pb.Verdict(anomaly_present=present, top_anomaly="dent" if present else "none"))


def test_look_zoom_answer() -> None:
    trajectory = make_trajectory()
    first = episode.next_step(trajectory)
    assert isinstance(first, episode.GenerateStep)
    assert [message.role for message in first.messages] == [pb.ROLE_SYSTEM, pb.ROLE_USER]
    assert first.policy_version == "v1"
    assert first.sampling.max_new_tokens == 64
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    assert episode.next_step(trajectory) == episode.CropStep(pb.Box(x_min=0.25, y_min=0.25, x_max=0.5, y_max=0.5), None)
    show(trajectory, 0.25, 0.5)
    second = episode.next_step(trajectory)
    assert isinstance(second, episode.GenerateStep)
    # Token-in, token-out: the policy's ids go back verbatim, and the conversation grows at its end only.
    assert second.messages[:2] == first.messages
    assert list(second.messages[2].segments[0].tokens.ids) == [1, 2, 3]
    assert second.sampling.seed != first.sampling.seed
    say(trajectory, answer(), 0.9)
    assert episode.next_step(trajectory) == episode.Finished()
    assert trajectory.stop_reason == pb.STOP_REASON_ANSWERED
    assert trajectory.verdict.top_anomaly == "dent"
    assert trajectory.anomaly_probability == pytest.approx(0.9)
    assert episode.tools_used(trajectory) == [protocol.CROP]


def test_every_prefix_is_a_resumable_state() -> None:
    trajectory = make_trajectory()
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    stored = pb.Trajectory.FromString(trajectory.SerializeToString())
    assert episode.next_step(stored) == episode.next_step(trajectory)
    show(trajectory, 0.25, 0.5)
    stored = pb.Trajectory.FromString(trajectory.SerializeToString())
    assert episode.next_step(stored) == episode.next_step(trajectory)


def test_zoom_after_a_composite_shows_the_composite() -> None:
    trajectory = make_trajectory()
    say(trajectory, protocol.query_reply("compare"))
    assert episode.next_step(trajectory) == episode.QueryStep(None)
    show(trajectory, 0, 1, exemplar=True)
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    step = episode.next_step(trajectory)
    assert isinstance(step, episode.CropStep)
    assert step.exemplar == EXEMPLAR


@pytest.mark.parametrize(
    ("view", "registered"), [(pb.COMPARISON_VIEW_SIDE_BY_SIDE, True), (pb.COMPARISON_VIEW_COMPOSITE, False)]
)
def test_zoom_after_other_comparisons_shows_the_part(view: "pb.ComparisonView.ValueType", registered: bool) -> None:
    trajectory = make_trajectory(view)
    say(trajectory, protocol.query_reply("compare"))
    show(trajectory, 0, 1, exemplar=True, registered=registered)
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    step = episode.next_step(trajectory)
    assert isinstance(step, episode.CropStep)
    assert step.exemplar is None


def test_comparison_after_a_zoom_keeps_the_box() -> None:
    trajectory = make_trajectory()
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    show(trajectory, 0.125, 0.625)
    say(trajectory, protocol.query_reply("compare"))
    assert episode.next_step(trajectory) == episode.QueryStep(pb.Box(x_min=0.25, y_min=0.25, x_max=0.5, y_max=0.5))


def test_boxes_in_a_crop_are_mapped_to_the_original() -> None:
    trajectory = make_trajectory()
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.5, 0.5)))
    show(trajectory, 0.5, 0.75)
    say(trajectory, protocol.crop_reply("closer", (0.5, 0, 1, 0.5), target_image=2))
    assert episode.next_step(trajectory) == episode.CropStep(pb.Box(x_min=0.625, y_min=0, x_max=0.75, y_max=0.5), None)


def test_a_bad_reply_is_answered_and_can_be_mended() -> None:
    trajectory = make_trajectory()
    say(trajectory, "<tool_call>{}</tool_call>")
    assert trajectory.turns[-1].observation.tool_error
    assert isinstance(episode.next_step(trajectory), episode.GenerateStep)
    say(trajectory, protocol.crop_reply("image 9", (0, 0, 1, 1), target_image=9))
    assert "no image 9" in trajectory.turns[-1].observation.tool_error
    say(trajectory, answer(False), 0.1)
    assert trajectory.stop_reason == pb.STOP_REASON_ANSWERED


def test_calls_beyond_the_limit_are_refused_and_the_verdict_is_forced() -> None:
    trajectory = make_trajectory(max_turns=3, max_tool_calls=1)
    say(trajectory, protocol.query_reply("compare"))
    show(trajectory, 0, 1, exemplar=True)
    for _ in range(2):
        say(trajectory, protocol.query_reply("again"))
        assert "No tool calls are left" in trajectory.turns[-1].observation.tool_error
    step = episode.next_step(trajectory)
    assert isinstance(step, episode.GenerateStep)
    assert step.messages[-1] == protocol.forced_answer_message()
    say(trajectory, 'true,"top_anomaly":"dent","bbox_2d":[],"visual_descriptions":[]}</answer>', 0.8)
    assert trajectory.stop_reason == pb.STOP_REASON_LIMIT
    assert trajectory.verdict.anomaly_present
    assert trajectory.verdict.top_anomaly == "dent"


@pytest.mark.parametrize(("probability", "present"), [(0.8, True), (0.2, False), (None, False)])
def test_a_forced_answer_that_cannot_be_read_keeps_its_verdict_token(probability: float | None, present: bool) -> None:
    trajectory = make_trajectory(max_turns=1)
    say(trajectory, "what?")
    say(trajectory, 'true,"top_anom', probability)
    assert trajectory.stop_reason == pb.STOP_REASON_MALFORMED
    assert trajectory.verdict.anomaly_present is present


def test_no_turns_at_all_force_the_verdict_at_once() -> None:
    trajectory = make_trajectory(max_turns=0)
    step = episode.next_step(trajectory)
    assert isinstance(step, episode.GenerateStep)
    assert step.messages[-1] == protocol.forced_answer_message()
    say(trajectory, 'false,"top_anomaly":"none"}</answer>', 0.3)
    assert trajectory.stop_reason == pb.STOP_REASON_LIMIT
    assert not trajectory.verdict.anomaly_present


def test_a_zoom_that_was_refused_does_not_count_as_looked_at() -> None:
    trajectory = make_trajectory()
    say(trajectory, protocol.crop_reply("look", (0.25, 0.25, 0.26, 0.26)))
    episode.add_observation(trajectory, pb.Observation(tool_error="The region is too small."), LATENCY)
    say(trajectory, protocol.query_reply("compare"))
    assert episode.next_step(trajectory) == episode.QueryStep(None)
    assert episode.tools_used(trajectory) == []


def test_out_of_time() -> None:
    trajectory = make_trajectory()
    episode.out_of_time(trajectory)
    assert episode.next_step(trajectory) == episode.Finished()
    assert not trajectory.HasField("verdict")
