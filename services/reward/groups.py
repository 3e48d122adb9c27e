"""From the events of a group's members to their scored trajectories. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from agentiad.v1 import events_pb2
from services.chassis.bus import MAX_EVENT_BYTES
from services.chassis.errors import BadInput
from services.reward import presets
from services.reward.scoring import score

# Beyond it, it is a mistake. As many as a trainer may ask for.
MAX_GROUP_SIZE = 1024
# What an event may grow by when it is scored: its reward, its new id and headers.
_REWARD_BYTES = 4096
_TERMS = ("group_size", "ground_truth", "reward_preset")


def parse_completed(value: bytes) -> events_pb2.TrajectoryCompleted:
    """The event that an agent published. Raises BadInput with everything that is wrong with it."""
    try:
        completed = events_pb2.TrajectoryCompleted.FromString(value)
    except DecodeError:
        raise BadInput("the body is not an agentiad.v1.TrajectoryCompleted") from None
    # It becomes a Kafka key, a Redis key and a part of event ids: short, printable, one line.
    wrong = []
    if not (0 < len(completed.group_id) <= 200 and completed.group_id.isprintable()):
        wrong.append("group_id must be 1 to 200 printable characters")
    if not 1 <= completed.group_size <= MAX_GROUP_SIZE:
        wrong.append(f"group_size must lie between 1 and {MAX_GROUP_SIZE}, not {completed.group_size}")
    elif completed.member >= completed.group_size:
        wrong.append(f"member {completed.member} must be below group_size {completed.group_size}")
    # A truth that nobody set would read as "normal".
    wrong += [f"{name} is missing" for name in ("trajectory", "ground_truth") if not completed.HasField(name)]
    if len(value) > MAX_EVENT_BYTES - _REWARD_BYTES:
        wrong.append(f"{len(value)} bytes leave no room for the reward: an event holds {MAX_EVENT_BYTES}")
    try:
        completed.trajectory.ended_at.ToDatetime()
    except (ValueError, OverflowError):
        wrong.append("trajectory.ended_at is out of range")
    try:
        presets.parse(completed.reward_preset)
    except ValueError as error:
        wrong.append(f"reward_preset: {error}")
    if wrong:
        raise BadInput("; ".join(wrong))
    return completed


def terms(completed: events_pb2.TrajectoryCompleted) -> bytes:
    """What the members of a group must have in common, as bytes to compare."""
    common = {name: getattr(completed, name) for name in _TERMS}
    return events_pb2.TrajectoryCompleted(**common).SerializeToString(deterministic=True)


def check_terms(completed: events_pb2.TrajectoryCompleted, agreed: bytes) -> None:
    """Raises BadInput: the group began on other terms than the member's."""
    if terms(completed) == agreed:
        return
    group = events_pb2.TrajectoryCompleted.FromString(agreed)
    # As text: a number that is not one is not equal to itself.
    names = [name for name in _TERMS if str(getattr(group, name)) != str(getattr(completed, name))]
    parts = " and ".join(names) or "encoding"
    raise BadInput(f"member {completed.member} differs from its group {completed.group_id!r} in {parts}")


def score_group(values: Sequence[bytes]) -> list[events_pb2.TrajectoryScored]:
    """Of all members of a group, as they were accepted by `parse_completed` and `check_terms`."""
    group = [events_pb2.TrajectoryCompleted.FromString(value) for value in values]
    rewards = score([member.trajectory for member in group], group[0].ground_truth, group[0].reward_preset)
    return [
        events_pb2.TrajectoryScored(event_id=f"{member.group_id}/{member.member}", completed=member, reward=reward)
        for member, reward in zip(group, rewards, strict=True)
    ]
