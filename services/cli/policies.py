"""`agentiad policy …`: which published version inspections run on.

The policies topic tells it all. Trainers publish as NAME-candidate; a version that is promoted is published as NAME,
and the last event of a name is what its followers serve. As NAME, `published_at` is when the version was promoted. It
rises from one promotion to the next, and a rollback publishes the version with the time that it had: so the order of
promotions outlives compaction, and rolling back twice goes back two versions.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from google.protobuf.message import DecodeError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from agentiad.v1.events_pb2 import PolicyPublished
from services.chassis import telemetry, topics
from services.chassis.bus import Bus, Event, cloudevents
from services.chassis.errors import BadInput
from services.chassis.locations import has_scheme
from services.chassis.settings import BusSettings, load
from services.cli.inspect import console, make_progress
from services.cli.plant import bus_name, open_bus
from services.evaluation.gate import Comparison, compare
from services.policy.checkpoints import CheckpointStore
from services.policy.settings import PolicySettings

SOURCE = "/agentiad/gate"
EvaluationSet = Literal["procedural"]
# Of six categories: 1,200 parts. Of candidates as good as the live version they let 97 % pass at a margin of 0.02 where
# the two differ on 3 % of the parts, and 77 % where they differ on 6 %. About a minute a version on two cores.
PER_CATEGORY = 200
# Beyond those that trainers measure and choose on: a version that was chosen for its luck there has none here.
FIRST_SEED = 2_000_000
COLOURS = {"live": "bold green", "candidate": "yellow", "former": "dim"}


@dataclass(frozen=True)
class History:
    """What was published of a policy, each version's last event."""

    candidates: dict[str, PolicyPublished]
    promoted: dict[str, PolicyPublished]  # in order of promotion
    live: PolicyPublished | None  # None: services run the checkpoint that they are started with

    def before_live(self) -> PolicyPublished:
        """Raises BadInput: there is none."""
        versions = list(self.promoted.values())
        place = versions.index(self.live) if self.live else 0
        if place == 0:
            raise BadInput("there is no version that was live before")
        return versions[place - 1]


def history_of(policy: str, log: Iterable[Event]) -> History:
    """Of one policy, from the whole log of policies. Bodies that cannot be read are skipped, as their followers do."""
    candidates, promoted, live = {}, {}, None
    for entry in log:
        try:
            event = PolicyPublished.FromString(entry.value)
        except DecodeError:
            continue
        if event.policy == topics.candidate_of(policy):
            candidates[event.version] = event
        elif event.policy == policy:
            promoted[event.version] = live = event
    in_order = sorted(promoted.values(), key=_published)
    return History(candidates, {event.version: event for event in in_order}, live)


def show(policy: str, as_json: bool, data_dir: Path) -> None:
    """Prints every version, in order of publication."""
    telemetry.configure("policy", "WARNING")
    rows = rows_of(asyncio.run(_read(policy, data_dir)))
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    table = Table("version", "state", "published", "promoted", "evaluation", title=escape(policy))
    for row in rows:
        evaluation = "\n".join(f"{name} {value:.4g}" for name, value in row["evaluation"].items())
        state = f"[{COLOURS[row['state']]}]{row['state']}[/]"
        table.add_row(
            escape(row["version"]), state, row["published_at"], row["promoted_at"] or "", escape(evaluation),
            end_section=True,
        )  # fmt: skip
    Console().print(table)
    if not any(row["state"] == "live" for row in rows):
        console.print(f"No version of {escape(policy)} is live on {bus_name(data_dir)}: its services run what they "
                      "were started with (CHECKPOINT).", highlight=False)  # fmt: skip


def rows_of(history: History) -> list[dict[str, Any]]:
    """What `list --json` prints for each version. Times are UTC; promoted_at is None for what never was live."""
    events = sorted({**history.promoted, **history.candidates}.values(), key=_published)
    return [_row(event, history.promoted.get(event.version), history.live) for event in events]


def _row(first: PolicyPublished, promoted: PolicyPublished | None, live: PolicyPublished | None) -> dict[str, Any]:
    last = promoted or first
    return {
        "version": last.version,
        "state": "candidate" if promoted is None else "live" if promoted == live else "former",
        "published_at": _published(first).isoformat(timespec="seconds"),
        "promoted_at": None if promoted is None else _published(promoted).isoformat(timespec="seconds"),
        "checkpoint_uri": last.checkpoint_uri,
        "sha256": last.sha256,
        "evaluation": dict(sorted(last.evaluation.items())),
    }


def promote(
    version: str, policy: str, evaluation_set: EvaluationSet, margin: float, data_dir: Path,
    per_category: int = PER_CATEGORY,
) -> int:  # fmt: skip
    """Makes a candidate live if it is not worse than the live version; exit status 1 if that is not shown.

    `per_category`: parts of each category that both inspect, an even number. Raises BadInput: there is no such
    candidate, it is live, or a checkpoint cannot be had.
    """
    telemetry.configure("policy", "WARNING")
    history = asyncio.run(_read(policy, data_dir))
    if version not in history.candidates:
        raise BadInput(f"{policy} has no candidate {version!r}; it has: {', '.join(history.candidates) or 'none'}")
    store = _Checkpoints(data_dir)
    live = history.live or store.started_with(policy)
    if live.version == version:
        raise BadInput(f"{version} is live already")
    comparison = _play(store.folder(live), store.folder(history.candidates[version]), margin, per_category)
    _print(comparison, evaluation_set, live.version, version)
    if not comparison.not_worse:
        console.print(f"[red]{escape(version)} stays a candidate:[/red] it may be worse by {margin} or more.")
        return 1
    promoted = promoted_from(history.candidates[version], policy, evaluation_set, comparison)
    # What services were started with is published first, so that one can roll back to it.
    events = [promoted] if history.live else [live, promoted]
    stamp(history, events)
    asyncio.run(go_live(policy, history, events, data_dir))
    console.print(f"[green]{escape(version)} goes live[/green] for {escape(policy)}.")
    return 0


def promoted_from(
    candidate: PolicyPublished, policy: str, evaluation_set: EvaluationSet, comparison: Comparison
) -> PolicyPublished:
    """The candidate's event as `policy`, with what the comparison measured beside what its trainer did."""
    event = PolicyPublished()
    event.CopyFrom(candidate)
    event.policy = policy
    figures = {
        "parts": comparison.parts, "balanced_accuracy": comparison.candidate, "live_balanced_accuracy": comparison.live,
        "difference": comparison.difference, "difference_low": comparison.low, "difference_high": comparison.high,
        "margin": comparison.margin, "gained": comparison.gained, "lost": comparison.lost,
    }  # fmt: skip
    for name, value in figures.items():
        event.evaluation[f"{evaluation_set}/{name}"] = value
    return event


def rollback(version: str | None, policy: str, data_dir: Path) -> None:
    """Makes a version live that was live before; None: the one before the live one.

    Raises BadInput: there is none, or its checkpoint cannot be had.
    """
    telemetry.configure("policy", "WARNING")
    history = asyncio.run(_read(policy, data_dir))
    if version is not None and version not in history.promoted:
        raise BadInput(f"{version!r} never was live; these were: {', '.join(history.promoted) or 'none'}")
    event = history.before_live() if version is None else history.promoted[version]
    _Checkpoints(data_dir).folder(event)
    asyncio.run(go_live(policy, history, [event], data_dir))
    console.print(f"[green]{escape(event.version)} is live again[/green] for {escape(policy)}.")


async def go_live(policy: str, history: History, events: Sequence[PolicyPublished], data_dir: Path) -> None:
    """Publishes; the last one is live then. Raises BadInput: another version went live since `history` was read."""
    async with _bus(data_dir) as bus:
        if (await _history(bus, policy)).live != history.live:
            raise BadInput(f"another version of {policy} went live meanwhile: begin again")
        for event in events:
            await _publish(bus, event)


def stamp(history: History, events: Sequence[PolicyPublished]) -> None:
    """Times of promotion: now, and later than any before, also where the clock that gave the last one was ahead."""
    last = max(map(_published, history.promoted.values()), default=datetime.min.replace(tzinfo=UTC))
    for event in events:
        last = max(datetime.now(UTC), last + timedelta(microseconds=1))
        event.published_at.FromDatetime(last)


class _Checkpoints:
    """Those that the policy services may load, by the same settings."""

    def __init__(self, data_dir: Path) -> None:
        self._settings = load(PolicySettings)
        self._store = CheckpointStore([self._settings.checkpoint, *self._settings.checkpoint_roots], data_dir)

    def folder(self, event: PolicyPublished) -> Path:
        """Raises BadInput: outside the roots, gone, or with other weights than were published; Transient: not now."""
        try:
            folder = asyncio.run(self._store.fetch(event.checkpoint_uri))
        except BadInput as error:
            raise BadInput(f"{event.version}: {error} (CHECKPOINT, CHECKPOINT_ROOTS)") from error
        found = _digest(folder)
        if event.sha256 and event.sha256 != found:
            raise BadInput(f"{event.version}: {folder} has sha256 {found}, not {event.sha256}")
        return folder

    def started_with(self, policy: str) -> PolicyPublished:
        """What services run while no version is live, as it would be published."""
        from services.vlm.checkpoint import card_of

        uri = self._settings.checkpoint
        folder = asyncio.run(self._store.fetch(uri))
        digest = _digest(folder)
        uri, version = uri if has_scheme(uri) else str(folder), card_of(folder, digest).version
        return PolicyPublished(policy=policy, version=version, checkpoint_uri=uri, sha256=digest)


def _digest(folder: Path) -> str:
    from services.vlm.checkpoint import sha256_of

    try:
        return sha256_of(folder)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _play(live: Path, candidate: Path, margin: float, per_category: int) -> Comparison:
    from services.trainer import heldout

    def verdicts(checkpoint: Path, words: str) -> list[bool]:
        with make_progress(words, len(parts)) as progress:
            outcomes = heldout.play_all(checkpoint, parts, done=lambda: progress.advance(progress.task_ids[0]))
        return [outcome.anomalous == outcome.right for outcome in outcomes]

    with console.status("Making parts that no training saw…"):
        parts = heldout.cases(per_category, per_category, FIRST_SEED)
    truth = [bool(case.part.defects) for case in parts]
    return compare(truth, verdicts(live, "Live version"), verdicts(candidate, "Candidate"), margin)


def _print(comparison: Comparison, evaluation_set: EvaluationSet, live: str, candidate: str) -> None:
    title = f"{evaluation_set}: {comparison.parts} parts that no training saw"
    table = Table("", "version", "balanced accuracy", title=title)
    table.add_row("live", escape(live), f"{comparison.live:.4f}")
    table.add_row("candidate", escape(candidate), f"{comparison.candidate:.4f}", end_section=True)
    interval = f"{comparison.difference:+.4f}  [{comparison.low:+.4f}, {comparison.high:+.4f}]"
    table.add_row("difference", "95 % interval, paired", escape(interval))
    counts = f"{comparison.gained} better, {comparison.lost} worse"
    table.add_row("parts", f"exact McNemar p = {comparison.p_value:.3g}", counts)
    Console().print(table)


async def _read(policy: str, data_dir: Path) -> History:
    async with _bus(data_dir) as bus:
        return await _history(bus, policy)


async def _history(bus: Bus, policy: str) -> History:
    all_read = asyncio.Event()
    log = bus.read(topics.POLICIES, from_beginning=True, stop=all_read, caught_up=all_read)
    return history_of(policy, [event async for event in log])


@asynccontextmanager
async def _bus(data_dir: Path) -> AsyncGenerator[Bus, None]:
    if not load(BusSettings).kafka_bootstrap_servers and not (data_dir / "bus.db").exists():
        raise BadInput(
            f"{bus_name(data_dir)}: there is no bus; name the --data-dir of the stack or of the training run"
        )
    bus = open_bus(data_dir)
    try:
        await bus.ensure_topics(topics.TOPICS)
        yield bus
    finally:
        await bus.close()


async def _publish(bus: Bus, event: PolicyPublished) -> None:
    event.event_id = uuid.uuid4().hex
    headers = cloudevents.headers(event.event_id, event.DESCRIPTOR.full_name, SOURCE, datetime.now(UTC))
    key = topics.policy_key(event.policy, event.version)
    await bus.publish(topics.POLICIES, key, event.SerializeToString(), headers)


def _published(event: PolicyPublished) -> datetime:
    return event.published_at.ToDatetime(UTC)
