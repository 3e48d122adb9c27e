"""Any trajectory and any truth, the absurd included, for hypothesis."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st

from agentiad.v1 import trajectory_pb2 as pb
from services.reward.boxes import Region
from tests.reward import trajectories as make

# The same examples every time; a busy machine is not a failure.
PATIENT = settings(deadline=None, derandomize=True, database=None, max_examples=200)
PRESETS = ["gated", "paper", "paper-as-run", "gated-tools", "paper-calls-type"]

# What a message can hold, and JSON beyond it.
floats32 = st.floats(width=32)
numbers = st.one_of(floats32, st.integers(-(10**400), 10**400), st.floats(0, 1), st.none(), st.booleans())
weird_boxes = st.builds(pb.Box, x_min=floats32, y_min=floats32, x_max=floats32, y_max=floats32)
kinds = st.one_of(st.sampled_from(["scratch", "Scratch_", "none", "missing hole", ""]), st.text(max_size=20))
probes = st.one_of(st.none(), floats32, st.floats(0, 1, width=32))


def spans(smallest: float = 0.01) -> st.SearchStrategy[tuple[float, float]]:
    return st.floats(0, 1 - smallest).flatmap(lambda low: st.tuples(st.just(low), st.floats(low + smallest, 1)))


# Boxes in the image, of a side of 0.01 at least.
regions: st.SearchStrategy[Region] = st.tuples(spans(), spans()).map(
    lambda xy: (xy[0][0], xy[1][0], xy[0][1], xy[1][1])
)
boxes = st.one_of(weird_boxes, regions.map(make.make_box))

arguments = st.one_of(
    st.builds(
        lambda box, target: json.dumps({"bbox_2d": box, "target_image": target}),
        st.one_of(regions.map(list), st.lists(numbers, max_size=5)),
        st.one_of(st.integers(-1, 4), numbers),
    ),
    st.sampled_from(["", "{", "[]", "[" * 100_000, '{"bbox_2d":[1e999,0,1,1]}', "null"]),
    st.text(max_size=20),
)
tool_calls = st.builds(
    pb.ToolCall,
    name=st.sampled_from(["crop_image_normalized", "crop_image_normalized", "query_image", "other"]),
    arguments_json=arguments,
)


@st.composite
def steps(draw: st.DrawFn) -> make.Step:
    if draw(st.integers(0, 5)) == 0:
        return make.malformed()
    error = draw(st.sampled_from(["", "", "", make.NO_EXEMPLAR, make.NO_CALLS_LEFT]))
    turn, answer = make.call(draw(tool_calls), draw(regions), error, draw(probes))
    if answer.observation.HasField("image") and draw(st.booleans()):
        answer.observation.region.CopyFrom(draw(weird_boxes))
    return turn, answer


@st.composite
def verdicts(draw: st.DrawFn) -> pb.Verdict:
    verdict = pb.Verdict(anomaly_present=draw(st.booleans()), top_anomaly=draw(kinds))
    if draw(st.booleans()):
        verdict.box.CopyFrom(draw(boxes))
    return verdict


@st.composite
def trajectories(draw: st.DrawFn) -> pb.Trajectory:
    return make.make_trajectory(
        *draw(st.lists(steps(), max_size=6)),
        verdict=draw(st.one_of(st.none(), verdicts())),
        stop=draw(st.sampled_from(pb.StopReason.values())),
    )


@st.composite
def truths(draw: st.DrawFn) -> pb.GroundTruth:
    truth = pb.GroundTruth(anomaly_present=draw(st.booleans()))
    for _ in range(draw(st.integers(0, 3))):
        defect = truth.defects.add(type=draw(kinds))
        if draw(st.booleans()):
            defect.box.CopyFrom(draw(boxes))
    return truth
