"""A trajectory read as a story, however it went."""

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import episode, protocol
from services.cli import story
from tests.cli.inspections import NORMAL, Script, make_truth, make_verdict


def test_steps_and_answer_in_their_order() -> None:
    script = Script()
    script.crop("a smudge", (0.1, 0.1, 0.4, 0.4))
    script.query("is it normal?", (0.1, 0.1, 0.4, 0.4))
    done = script.answer("it is dirt", NORMAL, 0.1)
    told = story.tell(done.trajectory)
    assert [(step.number, step.title, step.thought) for step in told.steps] == [
        (1, "Look closer", "a smudge"),
        (2, "Compare with normal", "is it normal?"),
    ]
    assert all(step.observation and step.observation.HasField("image") for step in told.steps)
    assert [round(step.seeing.total_seconds(), 3) for step in told.steps] == [0.03, 0.03]
    assert story.thought(told.answer or "") == "it is dirt"
    assert story.verdict_words(done) == "no anomaly"


def test_replies_that_could_not_be_read() -> None:
    script = Script()
    script.say("Hm, <b>let me see</b>")
    script.say(protocol.crop_reply("there", (0.1, 0.1, 0.2, 0.2), target_image=7))
    first, second = story.tell(script.trajectory).steps
    assert (first.title, first.call, first.thought) == ("Reply not understood", None, "Hm, let me see")
    assert first.observation is not None
    assert first.observation.tool_error
    assert second.observation is not None
    assert "no image 7" in second.observation.tool_error


def test_an_episode_that_ran_out_of_time() -> None:
    script = Script()
    script.say(protocol.query_reply("what is normal?"))
    episode.out_of_time(script.trajectory)
    told = story.tell(script.trajectory)
    assert told.answer is None
    assert [step.observation for step in told.steps] == [None]
    assert story.verdict_words(script.inspection()) == "no verdict"


def test_a_forced_answer_has_no_thought() -> None:
    script = Script(max_turns=0)
    script.say('true,"top_anomaly":"dent","bbox_2d":[],"visual_descriptions":[]}</answer>', 0.9)
    told = story.tell(script.trajectory)
    assert told.answer is not None
    assert told.answer.startswith("<think></think>")
    assert story.thought(told.answer) == ""
    assert story.verdict_words(script.inspection()) == "dent"


def test_an_empty_trajectory() -> None:
    assert story.tell(pb.Trajectory()) == story.Story((), None, story.tell(pb.Trajectory()).answering)
    assert story.verdict_words(events_pb2.InspectionCompleted()) == "no verdict"


def test_judged_by_the_decision() -> None:
    dent = make_verdict("dent", (0.1, 0.1, 0.2, 0.2))
    rejected = Script().answer("", dent, 0.9)
    truth = make_truth("scratch", (0, 0, 0.1, 0.1))
    assert story.judged(rejected, truth) is True
    assert story.judged(rejected, pb.GroundTruth()) is False
    assert story.judged(rejected, None) is None
    script = Script()
    script.answer("", dent, 0.55)
    assert story.judged(script.inspection(review_band=0.1), truth) is None


def test_truth_words() -> None:
    assert story.truth_words(pb.GroundTruth()) == "normal"
    assert story.truth_words(pb.GroundTruth(anomaly_present=True)) == "anomalous"
    two = pb.GroundTruth.Defect(type="dent")
    assert story.truth_words(pb.GroundTruth(anomaly_present=True, defects=[two, two])) == "dent"
