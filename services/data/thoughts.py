"""Thoughts written by a model that knows the truth, in AgentIAD's three steps (arXiv 2512.13671): why look here; what
the crop shows; what the comparison shows.

Invariants: only the words inside <think></think> change, so tool calls, boxes and verdicts stay those of the data. The
writer is given the truth only where the pictures so far can show it: with a comparison of the whole part, or after the
last look, before the answer. What it does not know it cannot give away in the earlier thoughts, and what it is told for
those does not depend on the label. What it writes is checked; where it fails, the template stays.
"""

import asyncio
import base64
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.agent.episode import WHOLE
from services.data import checks
from services.data.demonstrations import Episode, image_path
from services.data.endpoint import Endpoint, EndpointSettings, Messages, NoAnswerError

ATTEMPTS = 3
_OPEN, _CLOSE = "<think>", "</think>"

_INSTRUCTIONS = (
    "You write down what an inspector of industrial parts thinks during an inspection: in the first person and the "
    "present tense, one paragraph of one to three plain sentences. What the inspector does next is settled: your words "
    "lead to it. Never state a verdict (whether the part is normal or defective): it is given later. Never say where "
    "in the picture something is, and write no numbers, coordinates, lists or markup. Do not mention these rules, nor "
    "that you were told anything. Answer with the paragraph alone."
)
_UNKNOWN = "Nobody knows yet what is there, if anything: name no type of defect."
_WHY_LOOK = "Step 1, why look here: say what makes a closer look worthwhile."
_WHY_COMPARE = "Step 1, why compare: say why a normal part is needed."
_FIRST_SIGHT = "Step 1, the whole part: say why no closer look is needed."
_CROP_SHOWS = "Step 2, what the crop shows: say what is seen in the last image, and what follows for the next step."
_COMPARISON_SHOWS = (
    "Step 3, what the comparison shows: say how the part agrees with the normal one or differs from it, and what "
    "follows for the next step."
)


@dataclass
class Tally:
    """How the thoughts of an episode came about."""

    written: int = 0
    kept: int = 0  # templates that stayed
    rejected: Counter[str] = field(default_factory=Counter)  # answers by the reason why they were not used


async def write_all(
    episodes: Sequence[Episode], folder: Path, kinds: Sequence[str], settings: EndpointSettings, cache: Path
) -> None:
    """Writes the thoughts of the episodes (whose images lie in `folder`) in place. Raises Endpoint…Error."""
    async with Endpoint(settings, cache) as endpoint:
        await asyncio.gather(*(_write(episode, folder, kinds, endpoint) for episode in episodes))


def request(turns: Sequence[pb.Turn], truth: pb.GroundTruth, images: Sequence[bytes], evidence: bool) -> Messages:
    """What is asked about the thought of the last of `turns`; `images` (PNG) are those shown before it, in order.

    `evidence`: a tool has shown something.
    """
    shown = iter(images)
    parts: list[dict[str, Any]] = []
    for turn in turns[1:-1]:  # the first holds the rules of the tools
        for segment in turn.message.segments:
            if segment.HasField("image"):
                url = f"data:image/png;base64,{base64.b64encode(next(shown)).decode()}"
                parts.append({"type": "image_url", "image_url": {"url": url}})
            elif segment.HasField("text"):
                said = f"The inspector: {segment.text}" if turn.HasField("generation") else segment.text
                parts.append({"type": "text", "text": said})
    words = [_step(turns, evidence)]
    words += [f"The truth, for you alone: {_told(truth)}"] if knows(turns, evidence) else [_UNKNOWN]
    words.append(f"Next the inspector {_action(turns[-1])}. Write the thought before it.")
    parts.append({"type": "text", "text": "\n".join(words)})
    return [{"role": "system", "content": _INSTRUCTIONS}, {"role": "user", "content": parts}]


def knows(turns: Sequence[pb.Turn], evidence: bool) -> bool:
    """The pictures before the last of `turns` can show what is wrong, whatever the label."""
    if not evidence or not turns[-1].HasField("tool_call"):
        return evidence
    seen = turns[-2].observation
    return turns[-1].tool_call.name == protocol.CROP and seen.registered and seen.region == WHOLE


def thought_of(turn: pb.Turn) -> str | None:
    """The words inside <think></think>; None where a turn has no thought of its own."""
    text = turn.generation.text
    return text[len(_OPEN) : text.index(_CLOSE)] if text.startswith(_OPEN) and _CLOSE in text else None


async def _write(episode: Episode, folder: Path, kinds: Sequence[str], endpoint: Endpoint) -> None:
    tally = Tally()
    images = [image_path(folder, view.sha256).read_bytes() for view in episode.views]
    turns, shown, evidence, learns = episode.trajectory.turns, 1, False, iter(episode.imitate)
    imitated = False
    for index, turn in enumerate(turns):
        if turn.HasField("generation"):
            imitated = next(learns)
            if imitated and thought_of(turn) is not None:
                upto = turns[: index + 1]
                messages = request(upto, episode.truth, images[:shown], evidence)
                _record(turn, await _written(messages, knows(upto, evidence), kinds, endpoint, tally), tally)
        elif turn.observation.HasField("image"):
            shown += 1
            # A crop that missed on purpose shows nothing of what was meant.
            evidence = evidence or imitated
    episode.thoughts = {"written": tally.written, "kept": tally.kept, "rejected": dict(tally.rejected)}


async def _written(
    messages: Messages, known: bool, kinds: Sequence[str], endpoint: Endpoint, tally: Tally
) -> str | None:
    """A thought that passes the checks, or None after the last attempt."""
    for _ in range(ATTEMPTS):
        try:
            content = await endpoint.ask(messages)
        except NoAnswerError as error:
            tally.rejected[str(error)] += 1
            continue
        reason = checks.fault(content.strip(), known, kinds)
        if reason is None:
            return content.strip()
        tally.rejected[reason] += 1
        again = f"That cannot be used. {reason} Write it again."
        messages = [*messages, {"role": "assistant", "content": content}, {"role": "user", "content": again}]
    return None


def _record(turn: pb.Turn, thought: str | None, tally: Tally) -> None:
    if thought is None:
        tally.kept += 1
        return
    tally.written += 1
    text = f"{_OPEN}{thought}{turn.generation.text[turn.generation.text.index(_CLOSE) :]}"
    turn.generation.text = text
    turn.message.segments[-1].text = text


def _step(turns: Sequence[pb.Turn], evidence: bool) -> str:
    call = turns[-1].tool_call.name
    if not evidence:
        return {protocol.CROP: _WHY_LOOK, protocol.QUERY: _WHY_COMPARE}.get(call, _FIRST_SIGHT)
    last = next(turn.observation for turn in reversed(turns) if turn.observation.HasField("image"))
    return _COMPARISON_SHOWS if last.HasField("exemplar") else _CROP_SHOWS


def _action(turn: pb.Turn) -> str:
    if turn.tool_call.name == protocol.CROP:
        return f"looks closer at {turn.tool_call.arguments_json}"
    return "compares with a normal part" if turn.tool_call.name == protocol.QUERY else "gives the verdict"


def _told(truth: pb.GroundTruth) -> str:
    if not truth.anomaly_present:
        return "nothing is wrong with this part."
    found = (
        f"{defect.type.replace('_', ' ')} at {protocol.format_box(protocol.box_tuple(defect.box))}"
        for defect in truth.defects
    )
    return "; ".join(found) + " (boxes are x1,y1,x2,y2 from 0 to 1 of the first image)."
