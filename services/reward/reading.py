"""What the formulas need of a trajectory and of the truth, read from the records. Pure; nothing in a record makes it
fail: what cannot be read is absent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

from agentiad.v1 import trajectory_pb2 as pb
from services.reward.boxes import WHOLE, Region, region, region_of, within

CROP = "crop_image_normalized"
QUERY = "query_image"
# What the agent and zoom say where there is nothing to compare with: the library's fault, not the policy's.
_HONEST_ERRORS = ("There is no normal image of", "The normal image cannot be read")


class Outcome(Enum):
    """What became of a call."""

    SHOWN = auto()  # answered with pixels
    REFUSED = auto()  # the policy's own fault
    UNAVAILABLE = auto()  # nobody answered, or there was nothing to show


@dataclass(frozen=True)
class Call:
    """A tool call. box: a crop's, of the original, as the policy asked for it. probe: the probability of an anomaly in
    the verdict that was forced before the call."""

    name: str
    outcome: Outcome
    box: Region | None
    probe: float | None


@dataclass(frozen=True)
class Behaviour:
    """malformed: replies that were neither a call nor an answer. forced: the verdict had to be. answered: the policy
    came to the verdict by itself."""

    verdict: pb.Verdict | None
    calls: tuple[Call, ...]
    malformed: int
    forced: bool
    answered: bool

    @property
    def shown_crops(self) -> list[Region]:
        """Of the crops that it saw, in their order, those whose place is known."""
        return [call.box for call in self.calls if call.outcome is Outcome.SHOWN and call.box is not None]


@dataclass(frozen=True)
class Truth:
    """boxes and types: of the defects, where they are known."""

    anomalous: bool
    boxes: tuple[Region, ...]
    types: tuple[str, ...]

    def agrees(self, behaviour: Behaviour) -> bool:
        """Whether the episode's verdict is right; no verdict is not."""
        return behaviour.verdict is not None and behaviour.verdict.anomaly_present == self.anomalous


def read_truth(truth: pb.GroundTruth) -> Truth:
    boxes = (region_of(defect.box) for defect in truth.defects)
    types = sorted({defect.type for defect in truth.defects})
    return Truth(truth.anomaly_present, tuple(box for box in boxes if box), tuple(types))


def read(trajectory: pb.Trajectory) -> Behaviour:
    calls, malformed = [], 0
    # The region of the original that each image shows, in the order of their numbers.
    regions: list[Region | None] = [WHOLE]
    turns = trajectory.turns
    for turn, answer in zip(turns, [*turns[1:], pb.Turn()], strict=True):
        if turn.observation.HasField("image"):
            regions.append(region_of(turn.observation.region))
        if turn.HasField("tool_call"):
            calls.append(_read_call(turn, answer.observation, regions))
        elif turn.HasField("generation") and answer.observation.tool_error:
            malformed += 1
    return Behaviour(
        verdict=trajectory.verdict if trajectory.HasField("verdict") else None,
        calls=tuple(calls),
        malformed=malformed,
        forced=trajectory.stop_reason in (pb.STOP_REASON_LIMIT, pb.STOP_REASON_MALFORMED),
        answered=trajectory.stop_reason == pb.STOP_REASON_ANSWERED,
    )


def _read_call(turn: pb.Turn, answer: pb.Observation, regions: Sequence[Region | None]) -> Call:
    name = turn.tool_call.name
    box = _crop_box(turn.tool_call.arguments_json, regions) if name == CROP else None
    probe = turn.forced_anomaly_probability if turn.HasField("forced_anomaly_probability") else math.nan
    return Call(name, _outcome(answer), box, probe if 0 <= probe <= 1 else None)


def _outcome(answer: pb.Observation) -> Outcome:
    if answer.HasField("image"):
        return Outcome.SHOWN
    blamed = answer.tool_error and not answer.tool_error.startswith(_HONEST_ERRORS)
    return Outcome.REFUSED if blamed else Outcome.UNAVAILABLE


def _crop_box(arguments_json: str, regions: Sequence[Region | None]) -> Region | None:
    """The box that a crop asked for, in the coordinates of the original."""
    try:
        arguments = json.loads(arguments_json)
    except (ValueError, RecursionError):
        return None
    if not isinstance(arguments, dict):
        return None
    box, target = _box(arguments.get("bbox_2d")), arguments.get("target_image", 1)
    if box is None or type(target) is not int or not 1 <= target <= len(regions):
        return None
    frame = regions[target - 1]
    return None if frame is None else within(box, frame)


def _box(value: Any) -> Region | None:
    if not isinstance(value, list) or len(value) != 4 or not all(type(item) in (int, float) for item in value):
        return None
    try:
        x_min, y_min, x_max, y_max = map(float, value)
    except OverflowError:  # JSON's whole numbers have no bounds
        return None
    return region(x_min, y_min, x_max, y_max)
