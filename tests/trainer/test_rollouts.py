"""The trainer's end of the bus, on the real embedded bus; the test answers what agents and the reward would."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from agentiad.v1.events_pb2 import RolloutRequested, TrajectoryScored
from services.chassis import topics
from services.chassis.bus import Event, cloudevents
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.errors import Transient
from services.trainer.groups import Group
from services.trainer.rollouts import Rollouts, parse_scored, past_groups, right
from services.trainer.settings import RlSettings
from tests.policy.conversations import eventually
from tests.reward import plant
from tests.trainer.make_rollouts import (
    answer,
    answering,
    make_prompts,
    make_scored,
    make_settings,
    make_trajectory,
    publish,
)

RUN = "run"


@pytest.fixture
async def bus(tmp_path: Path) -> AsyncIterator[SqliteBus]:
    made = await make_bus(tmp_path / "bus.db")
    yield made
    await made.close()


async def make_bus(path: Path) -> SqliteBus:
    bus = SqliteBus(path)
    await bus.ensure_topics(topics.TOPICS)
    return bus


def make_rollouts(bus: SqliteBus, settings: RlSettings | None = None, run: str = RUN) -> Rollouts:
    made = Rollouts(settings or make_settings(), run, bus, make_prompts())
    made.groups.versions.append("v0")
    return made


def names(groups: Sequence[Group]) -> list[str]:
    return [group.group_id for group in groups]


def number(request: RolloutRequested) -> int:
    return position(request.group_id)


async def requests_of(bus: SqliteBus, groups: Sequence[str], each: int = 3) -> list[Event]:
    keys = {f"{group}/{member}" for group in groups for member in range(each)}
    return await plant.read(bus, topics.ROLLOUT_REQUESTS, keys, len(keys))


@pytest.mark.parametrize("staleness", [0, 1, 2])
async def test_never_more_is_in_flight_than_is_allowed(bus: SqliteBus, staleness: int) -> None:
    made = make_rollouts(bus, make_settings(max_staleness=staleness))
    taken: list[str] = []
    async with answering(bus, answer) as asked, made.reading():
        for step in range(1, 5):
            batch = await made.take()
            assert len(batch) == 2
            taken += names(batch)
            # All that were ever asked for: those trained on, the batch in training, and as many batches ahead.
            assert made.state()["number"] == 2 * (step + staleness)
            assert made.groups.waiting + made.groups.ready == 2 * staleness
    assert len(set(taken)) == len(taken) == 8
    assert {request.group_id for request in asked} >= set(taken)


async def test_a_group_comes_whole_with_its_members_in_order(bus: SqliteBus) -> None:
    made = make_rollouts(bus)
    async with answering(bus, answer), made.reading():
        batch = await made.take()
    for group in batch:
        assert [member.completed.member for member in group.members] == [0, 1, 2]
        assert {member.completed.group_id for member in group.members} == {group.group_id}
        assert group.advantages == pytest.approx([-1, 0, 1])


async def test_members_get_seeds_of_their_own_and_spread_over_the_agents(bus: SqliteBus) -> None:
    settings = make_settings(groups=1, group_size=8, max_staleness=0, reward="gated-type", temperature=0.8)
    made = make_rollouts(bus, settings)
    async with answering(bus, answer), made.reading():
        (group,) = await made.take()
    events = await requests_of(bus, [group.group_id], each=8)
    asked = [RolloutRequested.FromString(event.value) for event in events]
    assert {request.member for request in asked} == set(range(8))
    assert len({request.sampling.seed for request in asked}) == 8
    assert len({event.partition for event in events}) >= 3
    prompt = make_prompts()[group.prompt]
    for event, request in zip(events, asked, strict=True):
        assert cloudevents.parse(event.headers).type_name == "agentiad.v1.RolloutRequested"
        assert cloudevents.parse(event.headers).event_id == request.event_id
        assert (request.task, request.ground_truth) == (prompt.task, prompt.truth)
        assert request.group_size == 8
        assert request.sampling.temperature == pytest.approx(0.8)
        assert (request.limits.max_turns, request.limits.max_tool_calls, request.limits.max_new_tokens) == (6, 3, 128)
        assert request.reward_preset == "gated-type"
        assert request.probe_verdicts


async def test_only_the_gated_reward_needs_probes(bus: SqliteBus) -> None:
    made = make_rollouts(bus, make_settings(reward="paper"))
    async with answering(bus, answer) as asked, made.reading():
        await made.take()
    assert not any(request.probe_verdicts for request in asked)


async def test_two_groups_on_one_prompt_get_other_seeds(bus: SqliteBus) -> None:
    made = make_rollouts(bus, make_settings(groups=6))  # of five prompts
    async with answering(bus, answer) as asked, made.reading():
        await made.take()
    assert len({request.sampling.seed for request in asked}) == len({request.event_id for request in asked})


async def test_a_group_past_its_deadline_is_replaced(bus: SqliteBus) -> None:
    """One member of the first group never comes in time, but long after."""
    made = make_rollouts(bus, make_settings(max_staleness=0, group_deadline_s=3.0))

    def reply(request: RolloutRequested) -> TrajectoryScored | None:
        return None if number(request) == 0 and request.member == 1 else answer(request)

    async with answering(bus, reply) as asked, made.reading():
        batch = await made.take()
        assert made.groups.dropped["late"] >= 1
        late = next(request for request in asked if number(request) == 0 and request.member == 1)
        await publish(bus, answer(late))
        assert late.group_id not in names(batch) + names(await made.take())


async def test_without_agents_it_stops_and_says_what_to_look_at(bus: SqliteBus) -> None:
    made = make_rollouts(bus, make_settings(group_deadline_s=0.2, policy="line7"))
    with pytest.raises(Transient, match=r"no batch of 2 groups .*WORK=rollout.* follows line7-candidate"):
        async with made.reading():
            await made.take()


async def test_groups_with_nothing_to_teach_are_replaced_and_seen(bus: SqliteBus) -> None:
    made = make_rollouts(bus, make_settings(max_staleness=0))

    def reply(request: RolloutRequested) -> TrajectoryScored:
        return answer(request, total=1.0 if number(request) < 3 else None)

    async with answering(bus, reply), made.reading():
        batch = await made.take()
        seen = made.seen()
    assert min(map(position, names(batch))) == 3
    assert made.groups.dropped["equal"] == 3
    assert {scored.completed.group_id for scored in seen} > set(names(batch))
    assert made.seen() == []


async def test_groups_of_too_old_a_policy_are_replaced(bus: SqliteBus) -> None:
    made = make_rollouts(bus)
    serving = ["v0"]
    async with answering(bus, lambda request: answer(request, serving)), made.reading():
        await made.take()
        await eventually(lambda: made.groups.ready == 2)
        made.groups.versions += ["v1", "v2"]
        serving[:] = ["v2"]
        batch = await made.take()
    assert {version for group in batch for version in group.versions} == {"v2"}
    assert made.groups.dropped["stale"] == 2


async def test_what_was_mostly_wrong_is_asked_again(bus: SqliteBus) -> None:
    """Two of five prompts are too hard."""
    made = make_rollouts(bus, make_settings(hard_share=1.0))

    def reply(request: RolloutRequested) -> TrajectoryScored:
        hard = request.task.image.reference.uri in ("file:///1.png", "file:///2.png")
        truth = request.ground_truth.anomaly_present
        trajectory = make_trajectory(anomalous=truth != hard)
        return make_scored(request.group_id, request.member, trajectory=trajectory, truth=truth)

    async with answering(bus, reply), made.reading():
        prompts = [group.prompt for _ in range(8) for group in await made.take()]
    easy = max(prompts.count(prompt) for prompt in (0, 3, 4))
    assert min(prompts.count(1), prompts.count(2)) > easy > 0


async def test_a_restart_goes_on_from_its_offsets_and_loses_nothing(bus: SqliteBus) -> None:
    """Killed after a step while a member of each group ahead is still to come; all of these come while nobody reads."""
    made, missing = make_rollouts(bus), list[RolloutRequested]()

    def reply(request: RolloutRequested) -> TrajectoryScored | None:
        if number(request) >= 2 and request.member == 1:
            missing.append(request)
            return None
        return answer(request)

    async with answering(bus, reply), made.reading():
        first = await made.take()
        await eventually(lambda: members_of(made) == [2, 2] and len(missing) == 2)
        state = made.state()
    await publish(bus, *map(answer, missing))
    again = make_rollouts(bus)
    again.restore(state)
    async with again.reading():
        second = await again.take()
    assert sorted(map(position, names(first + second))) == [0, 1, 2, 3]
    assert sum(again.state()["offsets"].values()) == 12
    # What it asks for next has names of its own.
    assert again.state()["number"] == 6


async def test_a_log_that_was_made_anew_is_not_waited_for(bus: SqliteBus, tmp_path: Path) -> None:
    made = make_rollouts(bus)
    async with answering(bus, answer), made.reading():
        await made.take()
        state = made.state()
    other = await make_bus(tmp_path / "other.db")
    again = make_rollouts(other)
    again.restore(state)
    async with again.reading():
        with pytest.raises(LookupError, match="has no offset"):
            await again.take()
    await other.close()


async def test_what_a_checkpoint_waits_for_is_asked_again_word_for_word(bus: SqliteBus) -> None:
    made = make_rollouts(bus)
    async with (
        answering(bus, lambda request: answer(request) if number(request) < 2 else None) as asked,
        made.reading(),
    ):
        await made.take()
        await eventually(lambda: len(asked) == 12)
        again = make_rollouts(bus)
        again.restore(made.state())
        await again.ask_again()
        await eventually(lambda: len(asked) == 18)
    before = {request.event_id: request for request in asked[:12]}
    assert {number(request) for request in asked[12:]} == {2, 3}
    assert all(before[request.event_id] == request for request in asked[12:])


async def test_a_restart_keeps_everything(bus: SqliteBus) -> None:
    """Waiting and ready groups, prompts that were got wrong, offsets, versions and counts."""
    made = make_rollouts(bus, make_settings(max_staleness=2, hard_share=0.5))

    def reply(request: RolloutRequested) -> TrajectoryScored | None:
        return None if number(request) == 5 else answer(request, total=0.0 if number(request) == 1 else None)

    async with answering(bus, reply), made.reading():
        await made.take()
        await eventually(lambda: made.groups.dropped["equal"] == 1 and made.groups.waiting == 1)
        state = made.state()
    assert state["curriculum"]["drawn"] > 0
    again = Rollouts(make_settings(), RUN, bus, make_prompts())
    again.restore(state)
    assert again.state() == state


async def test_other_runs_and_what_is_no_trajectory_are_passed_over(bus: SqliteBus) -> None:
    made = make_rollouts(bus)
    await publish(bus, *(make_scored("other/000000-0", member) for member in range(3)))
    await bus.publish(topics.SCORED_TRAJECTORIES, "run/000000-0", b"\xff\xff", {})
    async with answering(bus, answer), made.reading():
        batch = await made.take()
    assert {name.split("/")[0] for name in names(batch)} == {RUN}
    # A run whose name begins alike is another one, too.
    own, alike = make_event("run/000000-0"), make_event("run2/000000-0")
    assert parse_scored(own, RUN) == TrajectoryScored.FromString(own.value)
    assert parse_scored(alike, RUN) is None
    assert parse_scored(make_event("run/000000-0", b"{}"), RUN) is None


async def test_the_past_of_a_run_is_the_same_in_whatever_order_it_lies(tmp_path: Path) -> None:
    """With copies, a group that never became whole, one of equal rewards, and another run's."""
    whole = [make_scored(f"run/{i:06d}-{i % 5}", member) for i in range(12) for member in range(3)]
    rest = [make_scored("run/000012-1", member, total=1.0) for member in range(3)]
    rest += [make_scored("run/000013-1", 0), make_scored("other/000000-0", 0), *whole[:5]]
    found = []
    for seed in range(3):
        lying = [*whole, *rest]
        random.Random(seed).shuffle(lying)
        bus = await make_bus(tmp_path / f"{seed}.db")
        await publish(bus, *lying)
        found.append(await past_groups(bus, RUN, make_settings()))
        await bus.close()
    assert found[0] == found[1] == found[2]
    assert names(found[0]) == [f"run/{i:06d}-{i % 5}" for i in range(12)]
    assert [group.prompt for group in found[0]] == [i % 5 for i in range(12)]
    assert all([member.completed.member for member in group.members] == [0, 1, 2] for group in found[0])


async def test_a_run_without_a_past_has_no_groups(bus: SqliteBus) -> None:
    await publish(bus, make_scored("other/000000-0", 0))
    assert await past_groups(bus, RUN, make_settings()) == []


@pytest.mark.parametrize(("verdict", "truth", "expected"), [
    (True, True, True), (False, False, True), (True, False, False), (False, True, False), (None, False, False),
])  # fmt: skip
def test_a_rollout_is_right_if_its_verdict_is_there_and_true(verdict: bool | None, truth: bool, expected: bool) -> None:
    scored = make_scored("run/000000-0", 0, trajectory=make_trajectory(anomalous=bool(verdict)), truth=truth)
    if verdict is None:
        scored.completed.trajectory.ClearField("verdict")
    assert right(scored) is expected


def make_event(group_id: str, value: bytes | None = None) -> Event:
    scored = make_scored(group_id, 0)
    return Event(topics.SCORED_TRAJECTORIES, group_id, scored.SerializeToString() if value is None else value, {}, 0, 0)


def position(name: str) -> int:
    """Of a group among all that its run asked for."""
    return int(name.split("/")[1].split("-")[0])


def members_of(made: Rollouts) -> list[int]:
    """How many members of each group that is waited for have come."""
    return [len(members) for _, _, members in made.state()["groups"]["waiting"]]
