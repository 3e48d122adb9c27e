"""Our reward: the verdict first, everything else only as far as it served a right one. Pure.

Invariants, by the sizes of the constants: any right verdict is worth more than any wrong one, whatever was done on the
way; nothing but the formulas' penalties is to be had for a wrong verdict; the total lies in [-0.9, 1.9].

A call helped if the verdict that was forced before it was wrong or unsure and the final one is right. That is known
only of calls that were probed (Turn.forced_anomaly_probability). IndusAgent gates its tool reward in this manner;
IAD-R1 gives types that are nearly right their share.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.reward.boxes import Region, area, covered, grown, iou, region_of
from services.reward.naming import similarity
from services.reward.reading import Behaviour, Outcome, Truth

COMPONENTS = ("verdict", "crop", "box", "type", "format", "tools")

VERDICT = 1.0  # a right one
CROP, BOX = 0.25, 0.25  # the evidence: the last crop and the answer's box are right on a defect
TYPE = 0.2  # the very name of a defect
FAULT = 0.25  # lost for a reply that cannot be read, a refused call, a verdict that had to be forced
FAULTS_AT_MOST = 0.5
HELP = 0.2  # once an episode: more calls that help are not better than fewer
# Lost for a probed call that did not help: more where the policy knew already than where it looked in vain. Were a vain
# look as dear, a policy that cannot read comparisons yet would unlearn to ask for them before it learns to read them.
NEEDLESS_CALL, VAIN_CALL = 0.1, 0.02
# With FAULTS_AT_MOST it leaves a right verdict above a wrong one.
CALLS_AT_MOST = 0.4
# Forced verdicts between these say that the policy does not know.
UNSURE = (0.25, 0.75)
# A crop may be larger than the defect by so much on every side for nothing: zoom shows as much around any box.
MARGIN = 0.1


def components(group: Sequence[Behaviour], truth: Truth) -> list[dict[str, float]]:
    """Of each member, by COMPONENTS' names; no member's depend on another."""
    return [_components(behaviour, truth) for behaviour in group]


def _components(behaviour: Behaviour, truth: Truth) -> dict[str, float]:
    right = truth.agrees(behaviour)
    found = right and truth.anomalous
    return {
        "verdict": VERDICT if right else 0.0,
        "crop": CROP * _looked(behaviour, truth) if found else 0.0,
        "box": BOX * _pointed(behaviour, truth) if found else 0.0,
        "type": TYPE * _named(behaviour, truth) if found else 0.0,
        "format": -_faults(behaviour),
        "tools": _tools(behaviour, truth),
    }


def _looked(behaviour: Behaviour, truth: Truth) -> float:
    """In [0, 1]: how well the last crop fits the defect that it fits best."""
    crops = behaviour.shown_crops
    return max((_fit(crops[-1], box) for box in truth.boxes), default=0.0) if crops else 0.0


def _pointed(behaviour: Behaviour, truth: Truth) -> float:
    """In [0, 1]: the same of the answer's box."""
    answer = region_of(behaviour.verdict.box) if behaviour.verdict else None
    return max((iou([answer], box) for box in truth.boxes), default=0.0) if answer else 0.0


def _fit(crop: Region, defect: Region) -> float:
    """In [0, 1]: what the crop shows of the defect, less where the crop is larger than the defect needs."""
    return covered(defect, crop) * min(1.0, area(grown(defect, MARGIN)) / area(crop))


def _named(behaviour: Behaviour, truth: Truth) -> float:
    """In [0, 1]: how near the type comes to that of a defect."""
    name = behaviour.verdict.top_anomaly if behaviour.verdict else ""
    return max((similarity(name, kind) for kind in truth.types), default=0.0)


def _faults(behaviour: Behaviour) -> float:
    refused = sum(call.outcome is Outcome.REFUSED for call in behaviour.calls)
    return min(FAULTS_AT_MOST, FAULT * (behaviour.malformed + refused + behaviour.forced))


def _tools(behaviour: Behaviour, truth: Truth) -> float:
    helped, cost = False, 0.0
    for call in behaviour.calls:
        if call.probe is None or call.outcome is Outcome.UNAVAILABLE:
            continue
        wanting = _wanting(call.probe, truth)
        # A refused call showed nothing, so it cannot have helped.
        if wanting and call.outcome is Outcome.SHOWN and truth.agrees(behaviour):
            helped = True
        else:
            cost += VAIN_CALL if wanting else NEEDLESS_CALL
    return (HELP if helped else 0.0) - min(CALLS_AT_MOST, cost)


def _wanting(probe: float, truth: Truth) -> bool:
    """The verdict that was forced before a call was wrong, or unsure."""
    wrong = (probe >= 0.5) != truth.anomalous
    return wrong or UNSURE[0] < probe < UNSURE[1]
