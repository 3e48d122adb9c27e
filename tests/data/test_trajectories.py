"""Demonstrations are legal episodes, true to the truth, and their prompts give no label away."""

import math
from collections import Counter

import numpy as np
import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import episode, protocol
from services.data import plans, procedural
from services.data.layouts import LAYOUTS
from services.data.trajectories import Demonstration, Demonstrator, Subject

VIEW = pb.COMPARISON_VIEW_COMPOSITE


def make_subject(category: str = "circuit", defect: str | None = None, seed: int = 1) -> Subject:
    part = procedural.make_part(category, seed, seed, defect, smudged=True)
    return plans.subject_of_part(part, np.random.default_rng(3), plans.Shares(wrong_exemplar=0, no_exemplar=0))


def make_demonstrator(subject: Subject) -> Demonstrator:
    return Demonstrator(subject, np.random.default_rng(0), VIEW, "demo")


def make_demonstrations(count: int) -> list[Demonstration]:
    demos = []
    for index in range(count):
        rng = np.random.default_rng([7, index])
        category = procedural.CATEGORIES[index % len(procedural.CATEGORIES)]
        kind = str(rng.choice(procedural.DEFECTS[category])) if rng.uniform() < 0.5 else None
        part = procedural.make_part(category, index, index, kind)
        subject = plans.subject_of_part(part, rng, plans.Shares())
        demos.append(plans.demonstrate(subject, rng, VIEW, str(index), plans.Shares()))
    return demos


@pytest.fixture(scope="module")
def demos() -> list[Demonstration]:
    return make_demonstrations(240)


def test_every_demonstration_ends_in_the_true_verdict(demos: list[Demonstration]) -> None:
    for demo in demos:
        assert demo.trajectory.stop_reason in (pb.STOP_REASON_ANSWERED, pb.STOP_REASON_LIMIT)
        assert demo.trajectory.verdict.anomaly_present == demo.truth.anomaly_present
        if demo.truth.anomaly_present:
            assert demo.trajectory.verdict.top_anomaly == demo.truth.defects[0].type
            assert demo.trajectory.verdict.HasField("box")


def test_every_call_is_one_that_the_agent_would_make(demos: list[Demonstration]) -> None:
    for demo in demos:
        shown = 1
        for turn in demo.trajectory.turns:
            if turn.HasField("generation") and turn.message.segments[0].text != protocol.FORCED_ANSWER:
                assert not isinstance(protocol.parse(turn.generation.text), protocol.Malformed)
            shown += turn.observation.HasField("image")
        assert shown == len(demo.views)
        assert len(demo.imitate) == sum(turn.HasField("generation") for turn in demo.trajectory.turns)


def test_all_habits_are_shown(demos: list[Demonstration]) -> None:
    habits = Counter(">".join(name.split("_")[0] for name in episode.tools_used(demo.trajectory)) for demo in demos)
    assert {"", "crop", "query", "crop>query", "query>crop"} <= set(habits)
    assert any(demo.trajectory.stop_reason == pb.STOP_REASON_LIMIT for demo in demos)
    assert any(turn.observation.tool_error for demo in demos for turn in demo.trajectory.turns)
    assert any(not all(demo.imitate) for demo in demos)


def test_a_miss_is_mended_and_not_imitated() -> None:
    subject = make_subject("woven", "dent")
    demonstrator = make_demonstrator(subject)
    target = subject.defects[0][1]
    demonstrator.look(target, miss=True)
    demonstrator.look(target, again=True)
    demo = demonstrator.answer()
    assert demo.imitate == [False, True, True]
    assert [bool(view.marks) for view in demo.views] == [True, False, True]


def test_a_crop_after_a_comparison_is_a_comparison() -> None:
    subject = make_subject("pin_board", "missing")
    demonstrator = make_demonstrator(subject)
    demonstrator.query()
    assert demonstrator.aligned
    assert demonstrator.sees_all
    demonstrator.look(subject.defects[0][1])
    demo = demonstrator.answer()
    turns = [turn for turn in demo.trajectory.turns if turn.observation.HasField("image")]
    assert [turn.observation.registered for turn in turns] == [True, True]
    assert [mark.label for mark in demo.views[2].marks] == ["missing"]


def test_what_one_picture_cannot_show_is_marked_in_comparisons_alone() -> None:
    subject = make_subject("pin_board", "missing")
    demonstrator = make_demonstrator(subject)
    demonstrator.look(subject.defects[0][1])
    demonstrator.query()
    demo = demonstrator.answer()
    assert [any(mark.label == "missing" for mark in view.marks) for view in demo.views] == [False, False, True]


def test_a_forced_answer_continues_the_forced_opening() -> None:
    demo = make_demonstrator(make_subject("woven", "spots")).forced_answer()
    first, second = demo.trajectory.turns[-1].message.segments
    assert first.text == protocol.FORCED_ANSWER
    assert isinstance(protocol.parse(first.text + second.text), protocol.Answer)


def test_without_an_exemplar_the_query_is_answered_by_an_error() -> None:
    part = procedural.make_part("circuit", 1, 1, None)
    demonstrator = make_demonstrator(Subject(part.image, "circuit", (), visible=False))
    demonstrator.query()
    assert not demonstrator.aligned
    assert demonstrator.answer().trajectory.turns[-2].observation.tool_error == "There is no normal image of circuit."


def test_first_actions_on_layouts_do_not_follow_the_label(demos: list[Demonstration]) -> None:
    rates = []
    for anomalous in (False, True):
        first = [
            demo.trajectory.turns[2].tool_call.name == protocol.QUERY
            for demo in demos
            if demo.trajectory.task.category in LAYOUTS and demo.truth.anomaly_present == anomalous
        ]
        rates.append(np.mean(first))
    assert abs(rates[0] - rates[1]) < 0.25


def test_prompts_alone_tell_nothing(demos: list[Demonstration]) -> None:
    """The text-only probe (FACTS: label leak): naive Bayes on the words of the opening messages scores chance."""
    texts = [" ".join(s.text for turn in demo.trajectory.turns[:2] for s in turn.message.segments) for demo in demos]
    labels = [demo.truth.anomaly_present for demo in demos]
    half = len(demos) // 2
    counts = {label: Counter[str]() for label in (False, True)}
    for text, label in zip(texts[:half], labels[:half], strict=True):
        counts[label].update(text.split())
    vocabulary = set(counts[False]) | set(counts[True])

    def score(text: str, label: bool) -> float:
        total = sum(counts[label].values()) + len(vocabulary)
        return sum(math.log((counts[label][word] + 1) / total) for word in text.split())

    guesses = [score(text, True) > score(text, False) for text in texts[half:]]
    right = {
        label: np.mean([g == label for g, truth in zip(guesses, labels[half:], strict=True) if truth == label])
        for label in (False, True)
    }
    assert abs((right[False] + right[True]) / 2 - 0.5) < 0.15


def test_thoughts_before_an_answer_do_not_give_the_verdict_away(demos: list[Demonstration]) -> None:
    said: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
    for demo in demos:
        thought = demo.trajectory.turns[-1].generation.text.split("</think>")[0]
        said[demo.truth.anomaly_present][thought] += len(demo.views) > 1
    common = {thought for thought, count in (said[False] + said[True]).items() if count > 12}
    assert common
    assert all(said[False][thought] and said[True][thought] for thought in common)
