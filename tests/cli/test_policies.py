"""`agentiad policy`: what goes live, with real checkpoints on a real bus, and that a policy service takes it over."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agentiad.v1.events_pb2 import PolicyPublished
from services.chassis import topics
from services.chassis.bus import Event
from services.chassis.errors import BadInput
from services.cli import policies
from services.cli.plant import open_bus
from services.policy.following import follow
from services.policy.service import opened
from services.policy.settings import PolicySettings
from services.vlm.card import read_card, write_card
from services.vlm.checkpoint import sha256_of
from tests.cli.commands import agentiad

SHIPPED = Path(PolicySettings.model_fields["checkpoint"].default)
START = datetime(2026, 1, 1, tzinfo=UTC)
SET: policies.EvaluationSet = "procedural"
# 24 parts: enough to tell the shipped policy from one that sees nothing.
PER_CATEGORY = 4


@pytest.fixture(scope="module")
def blind(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped policy without its eyes: it has the habits, and guesses."""
    folder = tmp_path_factory.mktemp("checkpoints") / "blind"
    shutil.copytree(SHIPPED, folder)
    weights = load_file(SHIPPED / "model.safetensors")
    blinded = {name: torch.zeros_like(value) if "visual" in name else value for name, value in weights.items()}
    save_file(blinded, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def place(tmp_path: Path, blind: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the bus and checkpoints; services here start with one that sees nothing."""
    monkeypatch.setenv("CHECKPOINT", str(make_checkpoint(blind, tmp_path / "start", "start")))
    monkeypatch.setenv("CHECKPOINT_ROOTS", str(tmp_path))
    monkeypatch.setenv("TORCH_THREADS", "1")
    return tmp_path


def make_checkpoint(source: Path, folder: Path, version: str) -> Path:
    shutil.copytree(source, folder)
    card = read_card(folder)
    card.version = version
    write_card(folder, card)
    return folder


def make_event(
    version: str, policy: str = "policy", minutes: int = 0, checkpoint_uri: str = "", sha256: str = ""
) -> PolicyPublished:
    event = PolicyPublished(policy=policy, version=version, checkpoint_uri=checkpoint_uri, sha256=sha256)
    event.published_at.FromDatetime(START + timedelta(minutes=minutes))
    return event


def make_candidate(source: Path, place: Path, version: str) -> Path:
    """Publishes a copy of a checkpoint as a trainer does."""
    folder = make_checkpoint(source, place / version, version)
    event = make_event(version, topics.candidate_of("policy"), checkpoint_uri=folder.as_uri(), sha256=sha256_of(folder))
    event.evaluation["reward"] = 1.5
    asyncio.run(publish(place, event))
    return folder


async def publish(place: Path, *events: PolicyPublished) -> None:
    bus = open_bus(place)
    await bus.ensure_topics(topics.TOPICS)
    for event in events:
        key = topics.policy_key(event.policy, event.version)
        await bus.publish(topics.POLICIES, key, event.SerializeToString(), {})
    await bus.close()


def read_log(place: Path) -> list[PolicyPublished]:
    async def read() -> list[PolicyPublished]:
        bus, all_read = open_bus(place), asyncio.Event()
        log = bus.read(topics.POLICIES, from_beginning=True, stop=all_read, caught_up=all_read)
        events = [PolicyPublished.FromString(event.value) async for event in log]
        await bus.close()
        return events

    return asyncio.run(read())


def make_log(events: Sequence[PolicyPublished]) -> list[Event]:
    return [
        Event(topics.POLICIES, topics.policy_key(event.policy, event.version), event.SerializeToString(), {}, 0, offset)
        for offset, event in enumerate(events)
    ]


def compacted(log: Sequence[Event]) -> list[Event]:
    last = {event.key: event.offset for event in log}
    return [event for event in log if last[event.key] == event.offset]


def states(place: Path) -> dict[str, str]:
    listed = agentiad("policy", "list", "--json", "--data-dir", place, cwd=place)
    assert listed.returncode == 0, listed.stderr
    return {row["version"]: row["state"] for row in map(json.loads, listed.stdout.splitlines())}


def served(place: Path) -> str:
    """The version that a policy service which starts now takes over."""

    async def start() -> str:
        settings = PolicySettings(data_dir=place)
        bus, stop, settled = open_bus(place), asyncio.Event(), asyncio.Event()
        async with opened(settings) as service, asyncio.timeout(60), asyncio.TaskGroup() as group:
            group.create_task(follow(bus, settings.policy_name, service.load, stop, settled))
            await settled.wait()
            stop.set()
            version = service.versions.current.version
        await bus.close()
        return version

    return asyncio.run(start())


def promote(place: Path, version: str, margin: float = 0.02, per_category: int = PER_CATEGORY) -> int:
    return policies.promote(version, "policy", SET, margin, place, per_category)


def test_from_the_first_promotion_to_a_rollback(place: Path, blind: Path) -> None:
    shipped, blinded = make_candidate(SHIPPED, place, "good"), make_candidate(blind, place, "bad")
    assert states(place) == {"good": "candidate", "bad": "candidate"}
    assert served(place) == "start"

    assert promote(place, "good") == 0
    assert served(place) == "good"
    assert states(place) == {"good": "live", "bad": "candidate", "start": "former"}
    event = read_log(place)[-1]
    assert (event.policy, event.version, event.checkpoint_uri) == ("policy", "good", shipped.as_uri())
    assert event.sha256 == sha256_of(shipped) != sha256_of(blinded)
    evaluation = event.evaluation
    assert evaluation["reward"] == 1.5
    assert evaluation[f"{SET}/parts"] == 24
    assert evaluation[f"{SET}/balanced_accuracy"] > 0.8
    assert evaluation[f"{SET}/live_balanced_accuracy"] < 0.7
    difference = evaluation[f"{SET}/balanced_accuracy"] - evaluation[f"{SET}/live_balanced_accuracy"]
    assert evaluation[f"{SET}/difference"] == pytest.approx(difference)
    assert -0.02 < evaluation[f"{SET}/difference_low"] < difference < evaluation[f"{SET}/difference_high"]

    before = read_log(place)
    assert promote(place, "bad") == 1
    assert read_log(place) == before

    rolled = agentiad("policy", "rollback", "--data-dir", place, cwd=place)
    assert rolled.returncode == 0, rolled.stderr
    assert served(place) == "start"
    assert states(place) == {"good": "former", "bad": "candidate", "start": "live"}
    policies.rollback("good", "policy", place)
    assert served(place) == "good"


def test_a_refusal_shows_the_numbers(place: Path, blind: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same weights as those that are live: that so few parts came out alike says little."""
    make_candidate(blind, place, "twin")
    assert promote(place, "twin", per_category=2) == 1
    printed = capsys.readouterr()
    assert "twin stays a candidate" in printed.err
    assert "procedural: 12 parts" in printed.out
    assert "+0.0000  [-0.1667, +0.1667]" in printed.out
    assert "0 better, 0 worse" in printed.out
    assert promote(place, "twin", margin=0.3, per_category=2) == 0


def test_what_cannot_be_promoted(place: Path, blind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_candidate(blind, place, "twin")
    unknown = agentiad("policy", "promote", "none", "--data-dir", place, cwd=place)
    assert (unknown.returncode, unknown.stderr) == (2, "policy has no candidate 'none'; it has: twin\n")
    asyncio.run(publish(place, make_event("twin", checkpoint_uri=str(folder))))
    with pytest.raises(BadInput, match="twin is live already"):
        promote(place, "twin")
    torn = make_candidate(blind, place, "torn")
    shutil.copy(SHIPPED / "model.safetensors", torn)
    with pytest.raises(BadInput, match=r"torn: .* has sha256"):
        promote(place, "torn")
    shutil.rmtree(torn)
    with pytest.raises(BadInput, match=r"torn: .* no such folder"):
        promote(place, "torn")
    monkeypatch.delenv("CHECKPOINT_ROOTS")
    with pytest.raises(BadInput, match=r"outside the checkpoint roots .*CHECKPOINT_ROOTS"):
        promote(place, "torn")
    assert [event.version for event in read_log(place) if event.policy == "policy"] == ["twin"]


def test_only_what_was_live_comes_back(place: Path, blind: Path) -> None:
    folder = make_candidate(blind, place, "twin")
    with pytest.raises(BadInput, match="no version that was live before"):
        policies.rollback(None, "policy", place)
    with pytest.raises(BadInput, match="'twin' never was live; these were: none"):
        policies.rollback("twin", "policy", place)
    asyncio.run(publish(place, make_event("first", checkpoint_uri=str(folder)), make_event("second", minutes=1)))
    shutil.rmtree(folder)
    with pytest.raises(BadInput, match=r"first: .* no such folder"):
        policies.rollback(None, "policy", place)
    assert states(place) == {"first": "former", "second": "live", "twin": "candidate"}


async def test_what_was_compared_with_a_version_that_is_live_no_more_does_not_go_live(place: Path) -> None:
    await publish(place, make_event("old"))
    seen = policies.history_of("policy", make_log([make_event("old")]))
    await publish(place, make_event("other", minutes=1))
    with pytest.raises(BadInput, match="meanwhile"):
        await policies.go_live("policy", seen, [make_event("new", minutes=2)], place)


@pytest.mark.parametrize("keep", [list, compacted])
def test_each_rollback_goes_further_back(keep: Callable[[list[Event]], list[Event]]) -> None:
    """Also when compaction has removed all but the last event of each version."""
    a, b, c = (make_event(version, minutes=minutes) for minutes, version in enumerate("abc"))
    for log, live, before in (([a, b, c], c, b), ([a, b, c, b], b, a), ([a, b, c, b, c], c, b)):
        history = policies.history_of("policy", keep(make_log(log)))
        assert (history.live, list(history.promoted)) == (live, ["a", "b", "c"])
        assert history.before_live() == before
    first = policies.history_of("policy", keep(make_log([a, b, c, b, a])))
    with pytest.raises(BadInput, match="no version that was live before"):
        first.before_live()


def test_of_the_log_only_what_can_be_read_of_this_policy_counts() -> None:
    log = make_log([
        make_event("v1", "policy-candidate"), make_event("v2", "other"), make_event("v3", "other-candidate"),
        make_event("v4"),
    ])  # fmt: skip
    log.insert(1, Event(topics.POLICIES, "policy/v9", b"\xff\xffnonsense", {}, 0, 9))
    history = policies.history_of("policy", log)
    assert (list(history.candidates), list(history.promoted), history.live) == (["v1"], ["v4"], make_event("v4"))


def test_rows_are_in_order_of_publication() -> None:
    candidates = [make_event(version, "policy-candidate", minutes) for minutes, version in enumerate("abc")]
    promoted = [make_event("b", minutes=10), make_event("a", minutes=11)]
    rows = policies.rows_of(policies.history_of("policy", make_log([*candidates, *promoted])))
    assert [(row["version"], row["state"]) for row in rows] == [("a", "live"), ("b", "former"), ("c", "candidate")]
    assert rows[0]["published_at"] == "2026-01-01T00:00:00+00:00"
    assert [row["promoted_at"] for row in rows] == ["2026-01-01T00:11:00+00:00", "2026-01-01T00:10:00+00:00", None]


def test_a_promotion_comes_after_one_by_a_clock_that_is_ahead() -> None:
    ahead, new = make_event("old"), make_event("new")
    ahead.published_at.FromDatetime(datetime.now(UTC) + timedelta(days=1))
    policies.stamp(policies.history_of("policy", make_log([ahead])), [new])
    assert new.published_at.ToDatetime(UTC) > ahead.published_at.ToDatetime(UTC)


def test_a_table_for_people(place: Path, blind: Path) -> None:
    make_candidate(blind, place, "twin")
    listed = agentiad("policy", "list", "--data-dir", place, cwd=place)
    assert listed.returncode == 0, listed.stderr
    assert "reward 1.5" in listed.stdout
    assert "No version of policy is live" in listed.stderr


@pytest.mark.kafka
def test_on_kafka(place: Path, kafka: str, blind: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_BOOTSTRAP_SERVERS", kafka)
    make_candidate(blind, place, "twin")
    assert promote(place, "twin", margin=0.3, per_category=2) == 0
    assert served(place) == "twin"
    policies.rollback(None, "policy", place)
    assert served(place) == "start"
    assert states(place) == {"start": "live", "twin": "former"}
