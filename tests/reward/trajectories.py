"""Trajectories, truths and groups for the tests of reward, written down as the agent records them."""

from __future__ import annotations

from collections.abc import Sequence

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.reward.boxes import Region

# The defect of most tests: area 0.04, and 0.16 with zoom's margin.
DEFECT: Region = (0.4, 0.4, 0.6, 0.6)
AROUND_DEFECT: Region = (0.3, 0.3, 0.7, 0.7)
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)
NO_EXEMPLAR = "There is no normal image of bolt."
NO_CALLS_LEFT = "No tool calls are left. Answer now."
Step = Sequence[pb.Turn]


def make_box(box: Region) -> pb.Box:
    return pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])


def make_truth(*boxes: Region, types: Sequence[str] = (), anomalous: bool = True) -> pb.GroundTruth:
    """Defects with boxes, then defects of which only the type is known."""
    defects = [pb.GroundTruth.Defect(box=make_box(box)) for box in boxes]
    return pb.GroundTruth(
        anomaly_present=anomalous, defects=[*defects, *(pb.GroundTruth.Defect(type=kind) for kind in types)]
    )


NORMAL = make_truth(anomalous=False)


def make_verdict(anomalous: bool, kind: str = "", box: Region | None = None) -> pb.Verdict:
    verdict = pb.Verdict(anomaly_present=anomalous, top_anomaly=kind or ("" if anomalous else "none"))
    if box:
        verdict.box.CopyFrom(make_box(box))
    return verdict


def crop(
    box: Sequence[float], target: int = 1, *, region: Region = WHOLE, error: str = "", probe: float | None = None
) -> Step:
    """A crop call and what came of it: an image that shows `region`, or an error."""
    arguments = f'{{"bbox_2d":{list(box)},"target_image":{target}}}'
    return call(pb.ToolCall(name="crop_image_normalized", arguments_json=arguments), region, error, probe)


def query(*, region: Region = WHOLE, error: str = "", probe: float | None = None) -> Step:
    return call(pb.ToolCall(name="query_image", arguments_json="{}"), region, error, probe)


def call(tool_call: pb.ToolCall, region: Region = WHOLE, error: str = "", probe: float | None = None) -> Step:
    turn = pb.Turn(generation=pb.Generation(text="…"), tool_call=tool_call, forced_anomaly_probability=probe)
    shown = pb.Observation(image=pb.ImageReference(uri="file:///crop.png"), region=make_box(region))
    return turn, pb.Turn(observation=pb.Observation(tool_error=error) if error else shown)


def malformed() -> Step:
    turn = pb.Turn(generation=pb.Generation(text="hm"))
    return turn, pb.Turn(observation=pb.Observation(tool_error="Give a <tool_call> or an <answer>."))


def make_trajectory(
    *steps: Step,
    verdict: pb.Verdict | None = None,
    stop: pb.StopReason.ValueType = pb.STOP_REASON_ANSWERED,
) -> pb.Trajectory:
    trajectory = pb.Trajectory(verdict=verdict, stop_reason=stop)
    trajectory.turns.add(message=pb.Message(role=pb.ROLE_SYSTEM))
    trajectory.turns.add(message=pb.Message(role=pb.ROLE_USER))
    for step in steps:
        trajectory.turns.extend(step)
    trajectory.turns.add(generation=pb.Generation(text="<answer>…</answer>"))
    return trajectory


def make_completed(
    group_id: str, member: int, group_size: int = 3, truth: pb.GroundTruth | None = None, preset: str = ""
) -> events_pb2.TrajectoryCompleted:
    """A member that ended on its own second; even ones are right, all crop, odd ones compare as well."""
    steps = [crop(AROUND_DEFECT)] if member % 2 == 0 else [crop(AROUND_DEFECT), query()]
    trajectory = make_trajectory(*steps, verdict=make_verdict(member % 2 == 0, "scratch"))
    trajectory.episode_id = f"{group_id}-{member}"
    trajectory.ended_at.FromSeconds(1_800_000_000 + member)
    return events_pb2.TrajectoryCompleted(
        event_id=trajectory.episode_id,
        group_id=group_id,
        member=member,
        group_size=group_size,
        ground_truth=make_truth(DEFECT, types=["scratch"]) if truth is None else truth,
        trajectory=trajectory,
        reward_preset=preset,
    )
