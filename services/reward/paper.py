"""The rewards of AgentIAD (arXiv 2512.13671): as its equations are written, and as its public training code runs. Pure.

They are here to compare with. Neither rewards a call that helped: both push the use of query_image up everywhere.
Calls count as soon as they are readable, whatever became of them; a reply's format is valid if the policy came to an
answer by itself and no reply on the way was malformed.
"""

from __future__ import annotations

from collections.abc import Sequence

from services.reward.boxes import Region, iou
from services.reward.naming import normalised
from services.reward.reading import QUERY, Behaviour, Truth

AS_WRITTEN = ("verdict", "localisation", "type", "outcome", "query_rate", "calls")
AS_RUN = ("verdict", "localisation", "type", "query_rate", "calls")

TYPE = 0.1
QUERY_RATE = 0.5
CALL = 0.05  # lost for each call beyond the free ones
FREE_CALLS_AS_WRITTEN = 1
FREE_CALLS_AS_RUN = 2
# Above this overlap a crop counts as right on the defect.
GOOD_IOU = 0.5
# Wrong and never compared, as run.
WRONG_WITHOUT_QUERY = -0.3


def as_written(group: Sequence[Behaviour], truth: Truth) -> list[dict[str, float]]:
    """R = R_acc + R_iou + R_type + R_beh. Of R_beh, a mean over the group, each member gets the same: `outcome`,
    `query_rate` and `calls`. R_iou is that of the last crop with the defect that it fits best; 0 on a normal part."""
    behaviour_reward = {
        "outcome": _mean([float(truth.agrees(member)) for member in group]),
        "query_rate": QUERY_RATE * (_query_rate(group) - 1),
        "calls": -CALL * _mean([max(0, len(member.calls) - FREE_CALLS_AS_WRITTEN) for member in group]),
    }
    return [
        {
            "verdict": float(_is_valid(member) and truth.agrees(member)),
            "localisation": _localised(member.shown_crops[-1:], truth) if truth.anomalous else 0.0,
            "type": TYPE if truth.anomalous and _names_defect(member, truth) else 0.0,
            **behaviour_reward,
        }
        for member in group
    ]


def as_run(group: Sequence[Behaviour], truth: Truth) -> list[dict[str, float]]:
    """Each member by itself but for the group's query rate. R_iou is that of the union of its crops, on a normal part
    too, where the truth holds a (guessed) box."""
    rate = _query_rate(group)
    return [
        {
            "verdict": float(truth.agrees(member)) if _is_valid(member) else -1.0,
            "localisation": _localised(member.shown_crops, truth),
            "type": TYPE if _names_truth(member, truth) else 0.0,
            "query_rate": _query_reward(member, truth, rate),
            "calls": -CALL * max(0, len(member.calls) - FREE_CALLS_AS_RUN),
        }
        for member in group
    ]


def _query_reward(member: Behaviour, truth: Truth, rate: float) -> float:
    """Only who called a tool but never compared gets anything of it, and it is never good."""
    if not member.calls or _queried(member):
        return 0.0
    return QUERY_RATE * (rate - 1) if truth.agrees(member) else WRONG_WITHOUT_QUERY


def _is_valid(member: Behaviour) -> bool:
    return member.answered and not member.malformed


def _localised(crops: Sequence[Region], truth: Truth) -> float:
    best = max((iou(crops, box) for box in truth.boxes), default=0.0)
    return 1.0 if best > GOOD_IOU else best


def _names_truth(member: Behaviour, truth: Truth) -> bool:
    if truth.anomalous:
        return _names_defect(member, truth)
    return member.verdict is not None and normalised(member.verdict.top_anomaly) == "none"


def _names_defect(member: Behaviour, truth: Truth) -> bool:
    name = normalised(member.verdict.top_anomaly) if member.verdict else ""
    return bool(name) and name in {normalised(kind) for kind in truth.types}


def _queried(member: Behaviour) -> bool:
    return any(call.name == QUERY for call in member.calls)


def _query_rate(group: Sequence[Behaviour]) -> float:
    return _mean([float(_queried(member)) for member in group])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
