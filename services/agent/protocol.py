"""The prompt protocol: what the policy is told, and how its replies are read. Pure.

Nothing here may depend on the label of an image: the same words go to normal and to anomalous ones (FACTS: label leak).

A reply is `<think>…</think>` (optional) followed by exactly one of a tool call or an answer. Everything else is
`Malformed`, whose reason is a sentence for the policy, so that it can mend its reply.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from agentiad.v1 import trajectory_pb2 as pb

CROP = "crop_image_normalized"
QUERY = "query_image"

SYSTEM_PROMPT = (
    "You inspect industrial parts. Think in <think></think>, then do exactly one thing.\n"
    "Look closer: "
    f'<tool_call>{{"name":"{CROP}","arguments":{{"bbox_2d":[x1,y1,x2,y2],"target_image":1}}}}</tool_call>\n'
    f'Compare with a normal part: <tool_call>{{"name":"{QUERY}","arguments":{{}}}}</tool_call>\n'
    'Answer: <answer>{"anomaly_present":true,"top_anomaly":"type","bbox_2d":[x1,y1,x2,y2],'
    '"visual_descriptions":["what you see"]}</answer>\n'
    'For a normal part answer false, "none", [], []. Boxes are x1,y1,x2,y2 from 0 to 1.'
)

# What a forced verdict starts with: the policy's next token is the verdict.
VERDICT_MARKER = '"anomaly_present":'
FORCED_ANSWER = "<think></think><answer>{" + VERDICT_MARKER

# Longer replies are not parsed: no honest reply comes near it, and JSON parsing stays cheap.
MAX_REPLY_CHARACTERS = 16_384

_REPLY = re.compile(
    r"\s*(?:<think>(?P<think>.*?)</think>)?\s*"
    r"(?:<tool_call>(?P<call>.*?)</tool_call>|<answer>(?P<answer>.*?)</answer>)\s*",
    re.DOTALL,
)
_TAG = re.compile(r"</?(?:think|tool_call|answer)>")


@dataclass(frozen=True)
class CropCall:
    """A wish to see `box` (normalised, of image number `target_image`, 1 = the original) closer."""

    box: tuple[float, float, float, float]
    target_image: int


@dataclass(frozen=True)
class QueryCall:
    """A wish to see a normal exemplar."""


@dataclass(frozen=True)
class Answer:
    verdict: pb.Verdict


@dataclass(frozen=True)
class Malformed:
    """A reply that is neither a call nor an answer; `reason` is told to the policy."""

    reason: str


Reply = CropCall | QueryCall | Answer | Malformed


class _MalformedReplyError(Exception):
    pass


def opening_messages(task: pb.Task) -> list[pb.Message]:
    """The system and the first user message. Same words whatever the label."""
    words = f"Image 1: {task.category}."
    if task.defect_types:
        words += " Defect types: " + ", ".join(task.defect_types) + "."
    return [
        pb.Message(role=pb.ROLE_SYSTEM, segments=[pb.Segment(text=SYSTEM_PROMPT)]),
        pb.Message(role=pb.ROLE_USER, segments=[pb.Segment(image=task.image), pb.Segment(text=words)]),
    ]


def observation_message(
    observation: pb.Observation, image_number: int, view: pb.ComparisonView.ValueType
) -> pb.Message:
    """What the policy is shown of a tool's answer. `image_number` is the 1-based number of the image that it brings."""
    if observation.tool_error:
        return _user(pb.Segment(text=f"Error: {observation.tool_error}"))
    region = "[{:.2f},{:.2f},{:.2f},{:.2f}]".format(*box_tuple(observation.region))
    if not observation.HasField("exemplar"):
        words = f"Image {image_number}: closer, {region}."
    elif not observation.registered:
        words = f"Image {image_number}: a normal part, not aligned."
    elif view == pb.COMPARISON_VIEW_COMPOSITE:
        words = f"Image {image_number}: red this part, green normal, blue difference, {region}."
    else:
        words = f"Image {image_number}: normal part, {region}."
    return _user(pb.Segment(image=pb.Image(reference=observation.image)), pb.Segment(text=words))


def forced_answer_message() -> pb.Message:
    """An open assistant message that leaves the policy nothing but the verdict."""
    return pb.Message(role=pb.ROLE_ASSISTANT, segments=[pb.Segment(text=FORCED_ANSWER)])


def crop_reply(think: str, box: Sequence[float], target_image: int = 1) -> str:
    """The reply text of a zoom, as a policy should write it."""
    return _reply(think, f'<tool_call>{{"name":"{CROP}","arguments":{{"bbox_2d":{format_box(box)},'
                         f'"target_image":{target_image}}}}}</tool_call>')  # fmt: skip


def query_reply(think: str) -> str:
    """The reply text of a comparison, as a policy should write it."""
    return _reply(think, f'<tool_call>{{"name":"{QUERY}","arguments":{{}}}}</tool_call>')


def answer_reply(think: str, verdict: pb.Verdict) -> str:
    """The reply text of a verdict, as a policy should write it."""
    box = format_box(box_tuple(verdict.box)) if verdict.HasField("box") else "[]"
    words = json.dumps(list(verdict.visual_descriptions), ensure_ascii=False, separators=(",", ":"))
    return _reply(
        think,
        f"<answer>{{{VERDICT_MARKER}{'true' if verdict.anomaly_present else 'false'},"
        f'"top_anomaly":{json.dumps(verdict.top_anomaly, ensure_ascii=False)},'
        f'"bbox_2d":{box},"visual_descriptions":{words}}}</answer>',
    )


def format_box(box: Sequence[float]) -> str:
    return "[" + ",".join(f"{value:.2f}" for value in box) + "]"


def box_tuple(box: pb.Box) -> tuple[float, float, float, float]:
    return (box.x_min, box.y_min, box.x_max, box.y_max)


def parse(text: str) -> Reply:
    """Reads a reply; never raises. The box of an answer stays in the coordinates that the policy wrote."""
    if len(text) > MAX_REPLY_CHARACTERS:
        return Malformed(f"The reply is longer than {MAX_REPLY_CHARACTERS} characters.")
    match = _REPLY.fullmatch(text)
    if match is None:
        return Malformed(_explain(text))
    call, answer = match["call"], match["answer"]
    if _TAG.search(f"{match['think'] or ''} {call or ''} {answer or ''}"):
        return Malformed("Give one thought and exactly one tool call or answer.")
    try:
        return _parse_call(call) if call is not None else _parse_answer(answer)
    except _MalformedReplyError as error:
        return Malformed(str(error))


def _reply(think: str, action: str) -> str:
    return f"<think>{think}</think>{action}"


def _user(*segments: pb.Segment) -> pb.Message:
    return pb.Message(role=pb.ROLE_USER, segments=segments)


def _explain(text: str) -> str:
    actions = text.count("<tool_call>") + text.count("<answer>")
    if actions == 0:
        return "Give a <tool_call> or an <answer>."
    if actions > 1:
        return "Give exactly one tool call or one answer."
    return "Close every tag and write nothing around the tags."


def _parse_call(body: str) -> CropCall | QueryCall:
    call = _object(body, "The tool call")
    if set(call) - {"name", "arguments"}:
        raise _MalformedReplyError('A tool call has only "name" and "arguments".')
    name, arguments = call.get("name"), call.get("arguments", {})
    if not isinstance(arguments, dict):
        raise _MalformedReplyError('"arguments" must be an object.')
    if name == QUERY:
        if arguments:
            raise _MalformedReplyError(f"{QUERY} takes no arguments.")
        return QueryCall()
    if name != CROP:
        raise _MalformedReplyError(f"There is no such tool. The tools are {CROP} and {QUERY}.")
    if set(arguments) - {"bbox_2d", "target_image"}:
        raise _MalformedReplyError(f'{CROP} takes only "bbox_2d" and "target_image".')
    target = arguments.get("target_image", 1)
    if isinstance(target, bool) or not isinstance(target, int) or target < 1:
        raise _MalformedReplyError('"target_image" must be the number of an image, from 1.')
    return CropCall(_box(arguments.get("bbox_2d")), target)


def _parse_answer(body: str) -> Answer:
    answer = _object(body, "The answer")
    anomaly = answer.get("anomaly_present")
    if not isinstance(anomaly, bool):
        raise _MalformedReplyError('"anomaly_present" must be true or false.')
    kind = answer.get("top_anomaly", "none")
    words = answer.get("visual_descriptions", [])
    if not isinstance(kind, str):
        raise _MalformedReplyError('"top_anomaly" must be a string.')
    if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
        raise _MalformedReplyError('"visual_descriptions" must be a list of strings.')
    verdict = pb.Verdict(
        anomaly_present=anomaly, top_anomaly=kind if anomaly else "none", visual_descriptions=words if anomaly else []
    )
    if anomaly and answer.get("bbox_2d"):
        x_min, y_min, x_max, y_max = _box(answer["bbox_2d"])
        verdict.box.CopyFrom(pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))
    return Answer(verdict)


def _object(body: str, what: str) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        # JSON can spell half a character, which no message can carry.
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        raise _MalformedReplyError(f"{what} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise _MalformedReplyError(f"{what} must be a JSON object.")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _box(value: object) -> tuple[float, float, float, float]:
    if not isinstance(value, list) or len(value) != 4:
        raise _MalformedReplyError('"bbox_2d" must be four numbers [x1,y1,x2,y2].')
    if any(isinstance(item, bool) or not isinstance(item, int | float) for item in value):
        raise _MalformedReplyError('"bbox_2d" must hold numbers only.')
    if not all(abs(item) <= 1e6 and math.isfinite(item) for item in value):
        raise _MalformedReplyError('"bbox_2d" must lie between 0 and 1.')
    x_min, y_min, x_max, y_max = (float(item) for item in value)
    if not (0 <= x_min <= 1 and 0 <= y_min <= 1 and 0 <= x_max <= 1 and 0 <= y_max <= 1):
        raise _MalformedReplyError('"bbox_2d" must lie between 0 and 1.')
    if x_min >= x_max or y_min >= y_max:
        raise _MalformedReplyError('"bbox_2d" must have x1 < x2 and y1 < y2.')
    return (x_min, y_min, x_max, y_max)
