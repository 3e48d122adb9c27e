"""The Inspect call through the wire, on the real policy, zoom and retrieval."""

from __future__ import annotations

import hashlib
import itertools
import uuid
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from PIL import Image

from agentiad.v1 import agent_pb2, events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.cli.stack import Stack
from services.data.readers import Sample

pytestmark = pytest.mark.asyncio(loop_scope="module")


def make_captured(stack: Stack, image: Path, category: str = "pin_board") -> events_pb2.ImageCaptured:
    captured = events_pb2.ImageCaptured(
        event_id=uuid.uuid4().hex, line="L1", category=category, image=stack.images.describe(image)
    )
    captured.captured_at.GetCurrentTime()
    return captured


async def inspect(
    stack: Stack, captured: events_pb2.ImageCaptured, limits: pb.Limits | None = None
) -> tuple[list[pb.Turn], events_pb2.InspectionCompleted]:
    steps = [step async for step in stack.agent.Inspect(agent_pb2.InspectRequest(image=captured, limits=limits))]
    assert all(step.HasField("turn") for step in steps[:-1])
    return [step.turn for step in steps[:-1]], steps[-1].inspection


async def test_steps_are_streamed_and_make_up_the_trajectory(stack: Stack, part: Sample) -> None:
    turns, inspection = await inspect(stack, make_captured(stack, part.image))
    assert turns == list(inspection.trajectory.turns)
    assert inspection.decision in (events_pb2.DECISION_PASS, events_pb2.DECISION_REJECT)
    assert inspection.raw_score == inspection.trajectory.anomaly_probability
    assert inspection.policy_version == inspection.trajectory.policy_version
    assert inspection.trajectory.category_known
    for turn in turns:
        if turn.HasField("generation"):
            generation = turn.generation
            assert generation.policy_version == inspection.policy_version
            assert len(generation.token_ids) == len(generation.log_probabilities) == len(generation.loss_mask)
            assert list(turn.message.segments[-1].tokens.ids) == list(generation.token_ids)


async def test_the_prefix_of_the_turn_before_is_not_read_again(stack: Stack, part: Sample) -> None:
    _, inspection = await inspect(stack, make_captured(stack, part.image))
    spoken = [turn.generation for turn in inspection.trajectory.turns if turn.HasField("generation")]
    assert len(spoken) >= 2, "the policy answered at first sight; this test needs an episode of two turns"
    for before, after in itertools.pairwise(spoken):
        assert after.cached_tokens >= before.prompt_tokens


async def test_greedy_episodes_repeat(stack: Stack, part: Sample) -> None:
    _, first = await inspect(stack, make_captured(stack, part.image))
    _, second = await inspect(stack, make_captured(stack, part.image))
    assert [t.message for t in first.trajectory.turns] == [t.message for t in second.trajectory.turns]
    assert first.raw_score == pytest.approx(second.raw_score, abs=1e-5)


async def test_without_turns_the_first_look_must_do(stack: Stack, part: Sample) -> None:
    limits = pb.Limits(max_turns=0, max_tool_calls=0, max_new_tokens=64)
    _, inspection = await inspect(stack, make_captured(stack, part.image), limits)
    assert inspection.trajectory.stop_reason == pb.STOP_REASON_LIMIT
    assert inspection.HasField("raw_score")
    assert len(inspection.trajectory.turns) == 3


async def test_a_spent_budget_goes_to_a_person(stack: Stack, part: Sample) -> None:
    captured = make_captured(stack, part.image)
    captured.latency_budget.FromTimedelta(timedelta(milliseconds=1))
    _, inspection = await inspect(stack, captured)
    assert inspection.decision == events_pb2.DECISION_REVIEW
    assert inspection.trajectory.stop_reason == pb.STOP_REASON_LATENCY_BUDGET
    assert inspection.event_id == captured.event_id


async def test_a_category_nobody_was_trained_on_is_said(stack: Stack, part: Sample) -> None:
    _, inspection = await inspect(stack, make_captured(stack, part.image, category="left shoe"))
    assert not inspection.trajectory.category_known
    answers = [turn.observation.tool_error for turn in inspection.trajectory.turns if turn.observation.tool_error]
    assert all("left shoe" in answer or "Give" in answer or "left" in answer for answer in answers)


def what_colour(what: str) -> tuple[int, int, int]:
    return (len(what) * 9, 90, 160)


@pytest.mark.parametrize("what", ["gone", "sha256", "not an image", "outside", "no reference"])
async def test_unusable_images_have_a_status(stack: Stack, part: Sample, root: Path, what: str) -> None:
    # A picture of its own: what is in a cache is known by its digest, wherever it lies.
    Image.new("RGB", (64, 64), what_colour(what)).save(root / "own.png")
    captured = make_captured(stack, root / "own.png")
    code, words = grpc.StatusCode.INVALID_ARGUMENT, "own.png"
    match what:
        case "gone":
            (root / "own.png").unlink()
            code = grpc.StatusCode.NOT_FOUND
        case "sha256":
            captured.image.sha256 = "0" * 64
        case "not an image":
            (root / "own.png").write_text("<html>")
            captured.image.sha256 = hashlib.sha256(b"<html>").hexdigest()
        case "outside":
            captured.image.uri, words = "file:///etc/hostname", "file:///etc/hostname"
        case "no reference":
            captured.ClearField("image")
            words = "image.uri is empty"
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await inspect(stack, captured)
    assert raised.value.code() == code
    assert words in (raised.value.details() or "")
    await inspect(stack, make_captured(stack, part.image))  # and the agent goes on


async def test_a_caller_that_goes_away_frees_its_place(stack: Stack, part: Sample) -> None:
    call = stack.agent.Inspect(agent_pb2.InspectRequest(image=make_captured(stack, part.image)))
    await call.read()
    call.cancel()
    _, inspection = await inspect(stack, make_captured(stack, part.image))
    assert inspection.decision
