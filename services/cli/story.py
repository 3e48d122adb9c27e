"""An inspection read as a story: what the agent thought, which tool it asked for, what it saw. Pure."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from datetime import timedelta

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol

DECISIONS = {
    events_pb2.DECISION_UNSPECIFIED: "undecided",
    events_pb2.DECISION_PASS: "pass",
    events_pb2.DECISION_REJECT: "reject",
    events_pb2.DECISION_REVIEW: "review",
}
STOP_REASONS = {
    pb.STOP_REASON_UNSPECIFIED: "not finished",
    pb.STOP_REASON_ANSWERED: "answered",
    pb.STOP_REASON_LIMIT: "a limit was reached, the verdict was forced",
    pb.STOP_REASON_LATENCY_BUDGET: "the latency budget ran out",
    pb.STOP_REASON_MALFORMED: "the reply could not be read, the verdict was forced",
}
_TITLES = {protocol.CROP: "Look closer", protocol.QUERY: "Compare with normal"}

_THINK = re.compile(r"<think>(.*?)(?:</think>|$)", re.DOTALL)
_MARKUP = re.compile(r"<tool_call>.*|<answer>.*|</?\w+>", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """A reply that asked for something, and what came back; None where the episode ended before that."""

    number: int  # from 1
    reply: str
    call: pb.ToolCall | None  # None: the reply could not be read
    observation: pb.Observation | None
    thinking: timedelta
    seeing: timedelta
    forced: float | None  # the probability of an anomaly when it was asked to answer instead of calling

    @property
    def title(self) -> str:
        return _TITLES.get(self.call.name, self.call.name) if self.call else "Reply not understood"

    @property
    def thought(self) -> str:
        return thought(self.reply)


@dataclass(frozen=True)
class Story:
    """`answer` is the reply that held the verdict, with the words that forced it; None where there was none."""

    steps: tuple[Step, ...]
    answer: str | None
    answering: timedelta


def tell(trajectory: pb.Trajectory) -> Story:
    """The steps of a finished or unfinished trajectory, in their order."""
    steps: list[Step] = []
    answer: str | None = None
    answering = timedelta()
    for turn, after in itertools.zip_longest(trajectory.turns, trajectory.turns[1:]):
        if not turn.HasField("generation"):
            continue
        latency = turn.latency.ToTimedelta()
        reply = "".join(segment.text for segment in turn.message.segments) + turn.generation.text
        call = turn.tool_call if turn.HasField("tool_call") else None
        if call is None and after is None:
            answer, answering = reply, latency
            continue
        seen = after.observation if after is not None and after.HasField("observation") else None
        seeing = after.latency.ToTimedelta() if after is not None else timedelta()
        forced = turn.forced_anomaly_probability if turn.HasField("forced_anomaly_probability") else None
        steps.append(Step(len(steps) + 1, reply, call, seen, latency, seeing, forced))
    return Story(tuple(steps), answer, answering)


def thought(text: str) -> str:
    """What a reply thinks: the text inside <think>; of a reply without the tag, whatever lies outside of any markup."""
    match = _THINK.search(text)
    return " ".join((match[1] if match else _MARKUP.sub(" ", text)).split())


def judged(inspection: events_pb2.InspectionCompleted, truth: pb.GroundTruth | None) -> bool | None:
    """Whether the decision is right; None when it is neither pass nor reject, or no truth is known."""
    if truth is None or inspection.decision not in (events_pb2.DECISION_PASS, events_pb2.DECISION_REJECT):
        return None
    return (inspection.decision == events_pb2.DECISION_REJECT) == truth.anomaly_present


def truth_words(truth: pb.GroundTruth) -> str:
    """The truth in a word or two: "normal", or the types of the defects."""
    if not truth.anomaly_present:
        return "normal"
    types = dict.fromkeys(defect.type for defect in truth.defects if defect.type)
    return ", ".join(types) or "anomalous"


def verdict_words(inspection: events_pb2.InspectionCompleted) -> str:
    """The policy's verdict as a short line, before threshold and review band."""
    if not inspection.HasField("verdict") or inspection.trajectory.stop_reason == pb.STOP_REASON_LATENCY_BUDGET:
        return "no verdict"
    if not inspection.verdict.anomaly_present:
        return "no anomaly"
    return inspection.verdict.top_anomaly or "an anomaly"
