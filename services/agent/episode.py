"""An episode as a pure state machine. The trajectory is the whole state; the workers around it do the I/O.

    begin ──▶ next_step ──▶ GenerateStep ──▶ add_generation ─┐
                 ▲    └───▶ CropStep / QueryStep ──▶ add_observation
                 │                                           │
                 └───────────────────────────────────────────┘        until Finished

Invariants: turns alternate user and assistant after the system prompt; the last turn alone decides the next step, so a
trajectory that was stored after any turn is resumed from there; a limit ends the episode with a stop reason.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import protocol

WHOLE = pb.Box(x_min=0, y_min=0, x_max=1, y_max=1)


@dataclass(frozen=True)
class GenerateStep:
    """Ask the policy for one turn, made by the version that began the episode."""

    messages: list[pb.Message]
    sampling: pb.Sampling
    policy_version: str


@dataclass(frozen=True)
class CropStep:
    """Show `box` (of the original) closer: against `exemplar` where one was compared as a composite, else alone."""

    box: pb.Box
    exemplar: pb.ImageReference | None


@dataclass(frozen=True)
class QueryStep:
    """Find the nearest exemplar and compare it: in `box`, where the policy has looked closer before, else whole."""

    box: pb.Box | None


@dataclass(frozen=True)
class Finished:
    """The trajectory has its verdict and stop reason."""


Step = GenerateStep | CropStep | QueryStep | Finished


def begin(
    episode_id: str,
    task: pb.Task,
    limits: pb.Limits,
    sampling: pb.Sampling,
    card: PolicyCard,
) -> pb.Trajectory:
    """A trajectory that holds the system prompt and the task, for the policy of `card`."""
    trajectory = pb.Trajectory(
        episode_id=episode_id,
        task=task,
        limits=limits,
        sampling=sampling,
        comparison_view=card.comparison_view or pb.COMPARISON_VIEW_SIDE_BY_SIDE,
        category_known=task.category in card.categories,
        policy_version=card.version,
    )
    for message in protocol.opening_messages(task):
        trajectory.turns.add(message=message)
    return trajectory


def next_step(trajectory: pb.Trajectory) -> Step:
    """What to do next; a function of the record alone."""
    if trajectory.stop_reason:
        return Finished()
    last = trajectory.turns[-1]
    if last.HasField("generation"):
        return _tool_step(trajectory, protocol.parse(last.generation.text))
    messages = [turn.message for turn in trajectory.turns]
    if _assistant_turns(trajectory) >= trajectory.limits.max_turns:
        messages.append(protocol.forced_answer_message())
    sampling = pb.Sampling()
    sampling.CopyFrom(trajectory.sampling)
    sampling.max_new_tokens = trajectory.limits.max_new_tokens
    # Another seed a turn: the same one would tie the choices of one turn to those of the turn before.
    sampling.seed = (trajectory.sampling.seed + len(trajectory.turns)) % 2**64
    return GenerateStep(messages, sampling, trajectory.policy_version)


def forced_step(trajectory: pb.Trajectory) -> GenerateStep:
    """For a trajectory whose last turn is a tool call: the verdict instead of the call, of which one token will do."""
    messages = [turn.message for turn in trajectory.turns[:-1]]
    messages.append(protocol.forced_answer_message())
    return GenerateStep(messages, pb.Sampling(max_new_tokens=1), trajectory.policy_version)


def add_probe(trajectory: pb.Trajectory, generation: pb.Generation) -> None:
    """Records what `forced_step` brought."""
    if generation.HasField("anomaly_probability"):
        trajectory.turns[-1].forced_anomaly_probability = generation.anomaly_probability


def add_generation(trajectory: pb.Trajectory, generation: pb.Generation, latency: timedelta) -> None:
    """Records the policy's turn; ends the episode when it is a verdict, answers a bad reply with an error turn."""
    forced = _assistant_turns(trajectory) >= trajectory.limits.max_turns
    reason = _limit_reason(trajectory)
    message = protocol.forced_answer_message() if forced else pb.Message(role=pb.ROLE_ASSISTANT)
    message.segments.add(tokens=pb.TokenSequence(ids=generation.token_ids))
    turn = trajectory.turns.add(message=message, generation=generation)
    turn.latency.FromTimedelta(latency)
    if generation.HasField("anomaly_probability"):
        trajectory.anomaly_probability = generation.anomaly_probability
    if forced:
        _finish(trajectory, _forced_verdict(generation), reason)
        return
    match protocol.parse(generation.text):
        case protocol.Answer(verdict):
            _finish(trajectory, verdict, pb.STOP_REASON_ANSWERED)
        case protocol.Malformed(reason_text):
            _add_user_turn(trajectory, pb.Observation(tool_error=reason_text), timedelta())
        case protocol.CropCall() | protocol.QueryCall() as call:
            turn.tool_call.CopyFrom(_tool_call(call))
            error = _refusal(trajectory, call)
            if error:
                _add_user_turn(trajectory, pb.Observation(tool_error=error), timedelta())


def add_observation(trajectory: pb.Trajectory, observation: pb.Observation, latency: timedelta) -> None:
    """Records what a tool answered, as the next user turn."""
    _add_user_turn(trajectory, observation, latency)


def out_of_time(trajectory: pb.Trajectory) -> None:
    """Ends the episode because its latency budget ran out. The verdict stays empty."""
    trajectory.stop_reason = pb.STOP_REASON_LATENCY_BUDGET


def tools_used(trajectory: pb.Trajectory) -> list[str]:
    """Names of the tools whose calls were answered with pixels, in their order."""
    turns = trajectory.turns
    return [
        call.tool_call.name
        for call, answer in itertools.pairwise(turns)
        if call.HasField("tool_call") and answer.observation.HasField("image")
    ]


def _tool_step(trajectory: pb.Trajectory, reply: protocol.Reply) -> Step:
    match reply:
        case protocol.CropCall() as call:
            composite = trajectory.comparison_view == pb.COMPARISON_VIEW_COMPOSITE
            return CropStep(_in_original(trajectory, call), _last_exemplar(trajectory) if composite else None)
        case protocol.QueryCall():
            return QueryStep(_last_crop(trajectory))
    raise AssertionError("only an unanswered tool call can be the last turn of an unfinished episode")


def _tool_call(call: protocol.CropCall | protocol.QueryCall) -> pb.ToolCall:
    if isinstance(call, protocol.QueryCall):
        return pb.ToolCall(name=protocol.QUERY, arguments_json="{}")
    arguments = f'{{"bbox_2d":{protocol.format_box(call.box)},"target_image":{call.target_image}}}'
    return pb.ToolCall(name=protocol.CROP, arguments_json=arguments)


def _refusal(trajectory: pb.Trajectory, call: protocol.CropCall | protocol.QueryCall) -> str:
    """Why the call, already recorded as the last turn, cannot be made; empty when it can."""
    if sum(turn.HasField("tool_call") for turn in trajectory.turns) > trajectory.limits.max_tool_calls:
        return "No tool calls are left. Answer now."
    if isinstance(call, protocol.CropCall) and call.target_image > len(_shown_regions(trajectory)):
        return f"There is no image {call.target_image}. The last one is {len(_shown_regions(trajectory))}."
    return ""


def _shown_regions(trajectory: pb.Trajectory) -> list[pb.Box]:
    """The region of the original that each image shows, in the order of their numbers."""
    shown = [turn.observation.region for turn in trajectory.turns if turn.observation.HasField("image")]
    return [WHOLE, *shown]


def _in_original(trajectory: pb.Trajectory, call: protocol.CropCall) -> pb.Box:
    region = _shown_regions(trajectory)[call.target_image - 1]
    width, height = region.x_max - region.x_min, region.y_max - region.y_min
    x_min, y_min, x_max, y_max = call.box
    return pb.Box(
        x_min=region.x_min + x_min * width,
        y_min=region.y_min + y_min * height,
        x_max=region.x_min + x_max * width,
        y_max=region.y_min + y_max * height,
    )


def _last_exemplar(trajectory: pb.Trajectory) -> pb.ImageReference | None:
    """The exemplar of the last comparison that could be aligned."""
    for turn in reversed(trajectory.turns):
        if turn.observation.HasField("exemplar") and turn.observation.registered:
            return turn.observation.exemplar
    return None


def _last_crop(trajectory: pb.Trajectory) -> pb.Box | None:
    """The box that the policy last looked at closer, as it asked for it."""
    turns = trajectory.turns
    for i in range(len(turns) - 2, 0, -1):
        if turns[i].tool_call.name == protocol.CROP and turns[i + 1].observation.HasField("image"):
            reply = protocol.parse(turns[i].generation.text)
            assert isinstance(reply, protocol.CropCall)
            return _in_original(trajectory, reply)
    return None


def _add_user_turn(trajectory: pb.Trajectory, observation: pb.Observation, latency: timedelta) -> None:
    number = len(_shown_regions(trajectory)) + 1
    message = protocol.observation_message(observation, number, trajectory.comparison_view)
    turn = trajectory.turns.add(message=message, observation=observation)
    turn.latency.FromTimedelta(latency)


def _assistant_turns(trajectory: pb.Trajectory) -> int:
    return sum(turn.HasField("generation") for turn in trajectory.turns)


def _limit_reason(trajectory: pb.Trajectory) -> pb.StopReason.ValueType:
    """Why a verdict would be forced now: the last reply could not be read, or a limit was reached."""
    for turn in reversed(trajectory.turns):
        if turn.HasField("generation"):
            return pb.STOP_REASON_LIMIT if turn.HasField("tool_call") else pb.STOP_REASON_MALFORMED
    return pb.STOP_REASON_LIMIT


def _forced_verdict(generation: pb.Generation) -> pb.Verdict:
    """The forced answer as written; where it cannot be read, what its verdict token says."""
    reply = protocol.parse(protocol.FORCED_ANSWER + generation.text)
    if isinstance(reply, protocol.Answer):
        return reply.verdict
    anomaly = generation.HasField("anomaly_probability") and generation.anomaly_probability >= 0.5
    return pb.Verdict(anomaly_present=anomaly, top_anomaly="" if anomaly else "none")


def _finish(trajectory: pb.Trajectory, verdict: pb.Verdict, reason: pb.StopReason.ValueType) -> None:
    trajectory.verdict.CopyFrom(verdict)
    trajectory.stop_reason = reason
