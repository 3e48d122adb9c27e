"""Rollout requests in, trajectories out: real bus, real Redis, real policy, zoom and retrieval."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from redis.asyncio import Redis

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import GenerateRequest
from services.agent import protocol, rollout
from services.agent.records import ROLLOUT_TTL_S, Records
from services.agent.runner import Runner
from services.chassis import topics
from services.chassis.bus import Bus, Event, cloudevents
from services.chassis.bus.failures import REASON
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.errors import BadInput
from services.cli.stack import Stack
from services.data import procedural
from tests.chassis.bus.stores import PATIENCE_S
from tests.reward import plant
from tests.trainer.make_rollouts import make_request

pytestmark = pytest.mark.asyncio(loop_scope="module")

Played = tuple[events_pb2.RolloutRequested, events_pb2.TrajectoryCompleted]
DLQ = topics.dlq(topics.ROLLOUT_REQUESTS)


@pytest_asyncio.fixture(loop_scope="module")
async def bus(tmp_path: Path) -> AsyncIterator[SqliteBus]:
    made = SqliteBus(tmp_path / "bus.db")
    await made.ensure_topics(topics.TOPICS)
    yield made
    await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def records(redis_url: str) -> AsyncIterator[Records[events_pb2.TrajectoryCompleted]]:
    async with Redis.from_url(redis_url) as redis:
        yield Records(redis, events_pb2.TrajectoryCompleted, ROLLOUT_TTL_S)


@asynccontextmanager
async def working(bus: Bus, runner: Runner, records: Records[events_pb2.TrajectoryCompleted]) -> AsyncIterator[None]:
    """An agent until the block ends; what it raises is raised at the end."""
    stop = asyncio.Event()
    task = asyncio.create_task(rollout.run(bus, runner, records, max_in_flight=32, stop=stop))
    try:
        yield
    finally:
        stop.set()
        async with asyncio.timeout(PATIENCE_S):
            await task


def make_runner(stack: Stack) -> Runner:
    return Runner(stack.policy, stack.zoom, stack.retrieval)


def make_part(category: str = "pin_board", defect: str | None = "missing") -> procedural.Part:
    return procedural.make_part(category, 3, procedural.TRAINING_VARIANTS, defect)


async def ask(bus: Bus, *requests: events_pb2.RolloutRequested) -> None:
    for request in requests:
        await ask_body(bus, request.event_id, request.SerializeToString())


async def ask_body(bus: Bus, key: str, body: bytes, type_name: str = rollout.REQUEST_TYPE) -> None:
    headers = cloudevents.headers(key, type_name, "/agentiad/trainer", datetime.now(UTC), f"00-{key}")
    await bus.publish(topics.ROLLOUT_REQUESTS, key, body, headers)


async def requests_of(
    stack: Stack, parts: Sequence[procedural.Part], **limits: int
) -> list[events_pb2.RolloutRequested]:
    """Two members for each part, in a group of a new name."""
    names = [uuid.uuid4().hex for _ in parts]
    return [
        await make_request(stack, part, name, member, **limits)
        for part, name in zip(parts, names, strict=True)
        for member in range(2)
    ]


async def completed(bus: Bus, requests: Sequence[events_pb2.RolloutRequested], number: int) -> list[Event]:
    return await plant.read(bus, topics.TRAJECTORIES, {request.group_id for request in requests}, number)


async def play(
    stack: Stack,
    bus: Bus,
    records: Records[events_pb2.TrajectoryCompleted],
    requests: Sequence[events_pb2.RolloutRequested],
) -> list[Played]:
    await ask(bus, *requests)
    async with working(bus, make_runner(stack), records):
        events = await completed(bus, requests, len(requests))
    found = [events_pb2.TrajectoryCompleted.FromString(event.value) for event in events]
    by_id = {each.event_id: each for each in found}
    return [(request, by_id[request.event_id]) for request in requests]


def calls(trajectory: pb.Trajectory) -> list[int]:
    """The turns whose tool calls were made (not refused)."""
    answered = [index for index, turn in enumerate(trajectory.turns) if turn.HasField("observation")]
    return [
        index - 1
        for index in answered
        if trajectory.turns[index - 1].HasField("tool_call") and trajectory.turns[index].latency.ToTimedelta()
    ]


async def forced(stack: Stack, trajectory: pb.Trajectory, turn: int) -> float:
    """P(anomaly) of the verdict instead of turn `turn`, asked of the policy from outside."""
    request = GenerateRequest(
        messages=[*(each.message for each in trajectory.turns[:turn]), protocol.forced_answer_message()],
        sampling=pb.Sampling(max_new_tokens=4),
        policy_version=trajectory.policy_version,
    )
    return (await stack.policy.Generate(request)).generation.anomaly_probability


async def test_requests_become_trajectories_with_a_probe_before_each_call(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    requests = await requests_of(stack, [make_part("pin_board"), make_part("brushed_metal", "scratch")])
    probes, differing = 0, False
    for request, done in await play(stack, bus, records, requests):
        trajectory = done.trajectory
        assert (done.group_id, done.member, done.group_size) == (request.group_id, request.member, 2)
        assert (done.ground_truth, done.reward_preset) == (request.ground_truth, "gated")
        assert (trajectory.episode_id, trajectory.task) == (request.event_id, request.task)
        assert (trajectory.limits, trajectory.sampling) == (request.limits, request.sampling)
        assert trajectory.stop_reason
        assert trajectory.HasField("verdict")
        assert trajectory.ended_at.ToNanoseconds() > trajectory.started_at.ToNanoseconds()
        probed = [i for i, turn in enumerate(trajectory.turns) if turn.HasField("forced_anomaly_probability")]
        assert probed == calls(trajectory)
        for turn in probed:
            expected = await forced(stack, trajectory, turn)
            assert trajectory.turns[turn].forced_anomaly_probability == pytest.approx(expected, abs=1e-4)
            differing |= abs(expected - trajectory.anomaly_probability) > 0.01
        probes += len(probed)
    assert probes >= 2
    assert differing, "each verdict before a call is that after it: this test would not tell them apart"


async def test_nobody_is_probed_who_was_not_to_be(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    requests = await requests_of(stack, [make_part()])
    for request in requests:
        request.probe_verdicts = False
    played = await play(stack, bus, records, requests)
    assert any(calls(done.trajectory) for _, done in played)
    assert not any(turn.HasField("forced_anomaly_probability") for _, done in played for turn in done.trajectory.turns)


async def test_probes_change_nothing_of_what_is_said(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    requests = await requests_of(stack, [make_part()])
    again = [events_pb2.RolloutRequested.FromString(request.SerializeToString()) for request in requests]
    for request in again:
        request.event_id, request.group_id, request.probe_verdicts = uuid.uuid4().hex, uuid.uuid4().hex, False
    probed = await play(stack, bus, records, requests)
    plain = await play(stack, bus, records, again)
    for (_, one), (_, other) in zip(probed, plain, strict=True):
        assert [turn.message for turn in one.trajectory.turns] == [turn.message for turn in other.trajectory.turns]


async def test_members_of_a_group_sample_apart_and_a_seed_repeats(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    part = make_part()
    one, other = (
        await make_request(stack, part, uuid.uuid4().hex, 0),
        await make_request(stack, part, uuid.uuid4().hex, 1),
    )
    same = events_pb2.RolloutRequested.FromString(one.SerializeToString())
    same.event_id = same.group_id = uuid.uuid4().hex
    (_, a), (_, b), (_, c) = await play(stack, bus, records, [one, other, same])
    ids = [[list(turn.generation.token_ids) for turn in each.trajectory.turns] for each in (a, b, c)]
    assert ids[0] == ids[2] != ids[1]


async def test_limits_end_in_a_verdict(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    requests = await requests_of(stack, [make_part()], max_turns=0, max_tool_calls=0)
    for _, done in await play(stack, bus, records, requests):
        assert done.trajectory.stop_reason == pb.STOP_REASON_LIMIT
        assert done.trajectory.HasField("verdict")


async def test_a_request_that_comes_again_gets_the_same_bytes(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    (request, *_) = await requests_of(stack, [make_part()])
    await ask(bus, request, request)
    async with working(bus, make_runner(stack), records):
        twice = await completed(bus, [request], 2)
        await ask(bus, request)
        events = await completed(bus, [request], 3)
    assert twice == events[:2]
    assert len({event.value for event in events}) == 1
    assert len({tuple(event.headers.items()) for event in events}) == 1
    done = events_pb2.TrajectoryCompleted.FromString(events[0].value)
    attributes = cloudevents.parse(events[0].headers)
    assert (attributes.event_id, attributes.type_name) == (request.event_id, "agentiad.v1.TrajectoryCompleted")
    assert attributes.time == done.trajectory.ended_at.ToDatetime(tzinfo=UTC)
    assert attributes.traceparent == f"00-{request.event_id}"
    assert events[0].key == request.group_id


class CrashError(Exception):
    pass


class CrashingRecords(Records[events_pb2.TrajectoryCompleted]):
    """Remembers a first tool call's answer, then the process dies."""

    async def save_steps(self, event_id: str, trajectory: pb.Trajectory) -> None:
        await super().save_steps(event_id, trajectory)
        if len(trajectory.turns) == 4:
            raise CrashError


async def test_after_a_crash_the_episode_goes_on_from_its_steps(
    stack: Stack, redis_url: str, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    runner = make_runner(stack)
    (request, *_) = await requests_of(stack, [make_part()])
    request.sampling.temperature = 0
    async with Redis.from_url(redis_url) as redis:
        crashing = CrashingRecords(redis, events_pb2.TrajectoryCompleted, ROLLOUT_TTL_S)
        with pytest.raises(CrashError):
            await rollout.roll_out_once(runner, crashing, request)
    before = await records.steps(request.event_id)
    assert before is not None
    assert before.turns[2].HasField("forced_anomaly_probability")
    result = await rollout.roll_out_once(runner, records, request)
    assert list(result.trajectory.turns[:4]) == list(before.turns)
    assert await records.steps(request.event_id) is None


def make_valid() -> events_pb2.RolloutRequested:
    return events_pb2.RolloutRequested(
        event_id="g/0",
        group_id="g",
        group_size=2,
        task=pb.Task(image=pb.Image(reference=pb.ImageReference(uri="file:///a.png")), category="bolt"),
        sampling=pb.Sampling(temperature=1),
        limits=pb.Limits(max_turns=6, max_tool_calls=3, max_new_tokens=128),
    )


def changed(text: str = "", **changes: object) -> bytes:
    """`make_valid` with fields set on top; `text`: where they lie."""
    request = make_valid()
    inner = getattr(request, text) if text else request
    for name, value in changes.items():
        setattr(inner, name, value)
    return request.SerializeToString()


def without(path: str) -> bytes:
    request = make_valid()
    *parents, last = path.split(".")
    inner: object = request
    for parent in parents:
        inner = getattr(inner, parent)
    inner.ClearField(last)  # type: ignore[attr-defined]
    return request.SerializeToString()


def with_pixels() -> bytes:
    request = make_valid()
    request.task.image.content = b"\x89PNG"
    return request.SerializeToString()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "event_id must be"),
    "not a protobuf": (b"\xff\xff\xff\xff", "not an agentiad.v1.RolloutRequested"),
    "JSON": (b'{"event_id": "e1"}', "not an agentiad.v1.RolloutRequested"),
    "cut off": (make_valid().SerializeToString()[:-3], "not an agentiad.v1.RolloutRequested"),
    "text that is not UTF-8": (b"\x0a\x02\xc3\x28", "not an agentiad.v1.RolloutRequested"),
    "no event id": (changed(event_id=""), "event_id must be"),
    "event id of a megabyte": (changed(event_id="x" * 2**20), "event_id must be"),
    "event id with a NUL": (changed(event_id="a\0b"), "event_id must be"),
    "no group": (changed(group_id=""), "group_id must be"),
    "group with a line break": (changed(group_id="a\nb"), "group_id must be"),
    "a group of nobody": (changed(group_size=0), "group_size must lie between"),
    "a group of a million": (changed(group_size=10**6), "group_size must lie between"),
    "a member beyond its group": (changed(member=2), "member must be below group_size"),
    "no image": (without("task.image"), "task.image must be a reference"),
    "pixels in the event": (with_pixels(), "images do not ride in events"),
    "no category": (changed("task", category=""), "task.category is empty"),
    "turns without end": (changed("limits", max_turns=2**31), "limits.max_turns must be"),
    "no tokens": (changed("limits", max_new_tokens=0), "limits.max_new_tokens must lie"),
    "tokens without end": (changed("limits", max_new_tokens=2**31), "limits.max_new_tokens must lie"),
    "no limits": (without("limits"), "limits.max_new_tokens must lie"),
    "temperature below zero": (changed("sampling", temperature=-1), "sampling.temperature must be"),
    "temperature not a number": (changed("sampling", temperature=float("nan")), "sampling.temperature must be"),
    "temperature without end": (changed("sampling", temperature=float("inf")), "sampling.temperature must be"),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_bad_requests_are_refused_with_their_reason(name: str) -> None:
    value, reason = HOSTILE[name]
    with pytest.raises(BadInput, match=reason):
        rollout.parse_request(value)


async def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(BadInput, match=r"event_id.*group_id.*group_size.*image.*category.*max_new_tokens"):
        rollout.parse_request(b"")


async def test_good_requests_pass() -> None:
    assert rollout.parse_request(make_valid().SerializeToString()) == make_valid()


async def test_what_cannot_be_played_goes_to_the_dlq_with_the_reason(
    stack: Stack, bus: SqliteBus, records: Records[events_pb2.TrajectoryCompleted]
) -> None:
    """Of the table, and what only a service can find; the good one among them is played."""
    (good, *_) = await requests_of(stack, [make_part("woven", None)])
    gone, outside, hot = (events_pb2.RolloutRequested.FromString(good.SerializeToString()) for _ in range(3))
    gone.event_id, outside.event_id, hot.event_id = "gone", "outside", "hot"
    reference = gone.task.image.reference
    reference.uri, reference.sha256 = reference.uri.replace(reference.sha256, "0" * 64), "0" * 64
    outside.task.image.reference.uri = "file:///etc/hostname"
    hot.sampling.temperature = 1e30
    # An event of a megabyte cannot be published at all.
    bodies = {name: value for name, (value, _) in HOSTILE.items() if len(value) < 10**6}
    for name, value in bodies.items():
        await ask_body(bus, name, value)
    await ask_body(bus, "another type", good.SerializeToString(), "agentiad.v1.ImageCaptured")
    await bus.publish(topics.ROLLOUT_REQUESTS, "no CloudEvent", good.SerializeToString(), {})
    await ask(bus, gone, outside, hot, good)
    expected = {name: HOSTILE[name][1] for name in bodies} | {
        "another type": "ce_type 'agentiad.v1.ImageCaptured', expected agentiad.v1.RolloutRequested",
        "no CloudEvent": "not a CloudEvent",
        "gone": "0" * 64,
        "outside": "file:///etc/hostname",
        "hot": "temperature must lie between",
    }
    async with working(bus, make_runner(stack), records):
        letters = await plant.read(bus, DLQ, list(expected), len(expected))
        await completed(bus, [good], 1)
    assert {event.key for event in letters} == set(expected)
    for event in letters:
        assert expected[event.key] in event.headers[REASON]
