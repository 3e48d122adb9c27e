"""One HTML page of inspections: a summary, and each picture's evidence with the agent's words turn by turn.

The page needs nothing but the pictures that lie beside it, and runs no script. Names of files and words of a policy are
hostile input: the template escapes everything, and links are relative whatever a file is called.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import jinja2

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.cli import story

# Of a reply that could not be read: more of it explains nothing.
_MAX_RAW_CHARACTERS = 2_000


@dataclass(frozen=True)
class Row:
    """An image: its inspection, or why there is none. `evidence` and `trace`: files, relative to the page.

    `labels` stand beside its name. `facts`, with a label each, take the place of threshold and latency.
    """

    name: str
    inspection: events_pb2.InspectionCompleted | None = None
    error: str | None = None
    truth: pb.GroundTruth | None = None
    evidence: str | None = None
    trace: str | None = None
    labels: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Result:
    """How well a group of parts was told apart: balanced accuracies in [0, 1]."""

    name: str
    parts: int
    with_tools: float
    without_tools: float


@dataclass(frozen=True)
class Summary:
    """The head of the page; results where the truth is known."""

    title: str = "Inspections"
    note: str = ""
    categories: tuple[Result, ...] = ()
    total: Result | None = None
    things: str = "images"  # what the rows are


# What the page can be filtered by: class and words.
_KINDS = {
    "reject": "reject",
    "review": "review",
    "pass": "pass",
    "undecided": "undecided",
    "error": "no inspection",
    "wrong": "wrong",
    "unknown": "unknown category",
}


def write_page(path: Path, rows: Sequence[Row], summary: Summary | None = None) -> None:
    """Writes the page to `path`, in the folder that `evidence` and `trace` of the rows start from. OSError."""
    entries = [_entry(row) for row in rows]
    counts = {kind: count for kind in _KINDS if (count := sum(kind in entry.kinds for entry in entries))}
    html = _template().render(summary=summary or Summary(), entries=entries, counts=counts, words=_KINDS)
    # Names of files may hold bytes that are no text.
    path.write_bytes(html.encode("utf-8", "replace"))


@dataclass(frozen=True)
class _Words:
    """A turn of the agent, in words."""

    title: str
    thought: str
    took: str
    call: str = ""
    saw: str = ""
    raw: str = ""  # a reply that could not be read
    is_error: bool = False
    forced: str = ""  # the probability that it would have answered with instead of calling


@dataclass(frozen=True)
class _Entry:
    """A row as the template shows it."""

    name: str
    kinds: tuple[str, ...]  # of _KINDS; the first is the decision
    evidence: str
    trace: str
    error: str = ""
    category: str = ""
    category_known: bool = True
    answer: str = ""
    truth: str = ""
    score: str = ""
    descriptions: tuple[str, ...] = ()
    turns: tuple[_Words, ...] = ()
    labels: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()


def _entry(row: Row) -> _Entry:
    truth = story.truth_words(row.truth) if row.truth is not None else ""
    evidence, trace = _link(row.evidence), _link(row.trace)
    inspection = row.inspection
    if inspection is None:
        reason = row.error or "It was not inspected."
        return _Entry(row.name, ("error",), evidence, trace, error=reason, truth=truth)
    trajectory = inspection.trajectory
    kinds = [story.DECISIONS[inspection.decision]]
    if story.judged(inspection, row.truth) is False:
        kinds.append("wrong")
    if not trajectory.category_known:
        kinds.append("unknown")
    return _Entry(
        row.name,
        tuple(kinds),
        evidence,
        trace,
        error=row.error or "",
        category=inspection.category,
        category_known=trajectory.category_known,
        answer=story.verdict_words(inspection),
        truth=truth,
        score=f"{inspection.raw_score:.3f}" if inspection.HasField("raw_score") else "none",
        descriptions=tuple(inspection.verdict.visual_descriptions),
        turns=_turns(trajectory),
        labels=row.labels,
        facts=(
            *(row.facts or _rule(inspection)),
            ("ended", story.STOP_REASONS[trajectory.stop_reason]),
            ("policy", inspection.policy_version or "unknown"),
        ),
    )


def _rule(inspection: events_pb2.InspectionCompleted) -> tuple[tuple[str, str], ...]:
    return (
        ("threshold", f"{inspection.threshold:.2f} ± {inspection.review_band:.2f}"),
        ("latency", _seconds(inspection.latency.ToTimedelta())),
    )


def _turns(trajectory: pb.Trajectory) -> tuple[_Words, ...]:
    told = story.tell(trajectory)
    turns = [
        _Words(
            step.title,
            step.thought if step.call else "",
            _seconds(step.thinking + step.seeing),
            call=f"{step.call.name} {step.call.arguments_json}" if step.call else "",
            saw=_saw(step.observation),
            raw="" if step.call else step.reply[:_MAX_RAW_CHARACTERS],
            is_error=step.observation is None or not step.observation.HasField("image"),
            forced="" if step.forced is None else f"{step.forced:.3f}",
        )
        for step in told.steps
    ]
    if told.answer is not None:
        turns.append(_Words("Answer", story.thought(told.answer), _seconds(told.answering)))
    return tuple(turns)


def _saw(observation: pb.Observation | None) -> str:
    if observation is None:
        return "The episode ended before the answer came."
    if not observation.HasField("image"):
        return observation.tool_error or "The tool showed nothing."
    if not observation.HasField("exemplar"):
        return ""
    aligned = "aligned" if observation.registered else "could not be aligned"
    return f"a normal part, {aligned} (confidence {observation.registration_confidence:.2f})"


def _seconds(duration: timedelta) -> str:
    return f"{duration.total_seconds():.2f} s"


def _link(name: str | None) -> str:
    """A relative address, whatever the name holds: never a scheme, a host, a query or a fragment."""
    return "./" + quote(os.fsencode(name)) if name else ""


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("services.cli"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2")
