"""The life of groups in any order of members, copies, strangers, versions, deadlines and restarts: against a model."""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agentiad.v1.events_pb2 import TrajectoryScored
from services.trainer.advantage import Scale
from services.trainer.groups import Groups
from tests.trainer.make_rollouts import make_scored, make_trajectory

CAPACITY, SIZE, STALENESS, DEADLINE_S = 4, 3, 1, 10.0


def make_groups(scale: Scale | None = None) -> Groups:
    return Groups(max_staleness=STALENESS, deadline_s=DEADLINE_S, scale=scale)


def stored(state: dict[str, Any]) -> dict[str, Any]:
    """Through a checkpoint and back."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    found: dict[str, Any] = torch.load(file, weights_only=True)
    return found


def restored(groups: Groups, now: float) -> Groups:
    again = make_groups()
    again.restore(stored(groups.state()), now)
    return again


@dataclass
class Expected:
    """One group as the model sees it."""

    prompt: int
    requested_at: float
    members: dict[int, TrajectoryScored] = field(default_factory=dict)

    @property
    def totals(self) -> list[float]:
        return [self.members[number].reward.total for number in range(SIZE)]

    @property
    def versions(self) -> set[str]:
        turns = [turn for member in self.members.values() for turn in member.completed.trajectory.turns]
        return {turn.generation.policy_version for turn in turns if turn.HasField("generation")}


class GroupsMachine(RuleBasedStateMachine):
    """Every group is in one place: waiting, ready or gone."""

    def __init__(self) -> None:
        super().__init__()
        self.groups, self.now, self.asked = make_groups(), 0.0, 0
        self.waiting: dict[str, Expected] = {}
        self.ready: dict[str, Expected] = {}
        self.gone: dict[str, TrajectoryScored] = {}  # with a member of each, which may come late
        self.dropped: Counter[str] = Counter()
        self.publish()

    @rule()
    def publish(self) -> None:
        self.groups.versions.append(f"v{len(self.groups.versions)}")

    @rule(prompt=st.integers(0, 3))
    def request(self, prompt: int) -> None:
        if self.groups.room(CAPACITY):
            name = f"run/{self.asked:06d}-{prompt}"
            self.groups.request(name, prompt, self.now)
            self.waiting[name] = Expected(prompt, self.now)
            self.asked += 1

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), number=st.integers(0, SIZE - 1), total=st.sampled_from([0.0, 1.0]))
    def member_comes(self, data: st.DataObject, number: int, total: float) -> None:
        """Where it was there already: a copy, or what another attempt at the same request brought."""
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        known = st.sampled_from([*self.groups.versions[-3:], *self.groups.versions[-1:] * 4])
        versions = data.draw(st.lists(st.one_of(*[known] * 9, st.just("foreign")), min_size=1, max_size=2))
        scored = make_scored(name, number, group_size=SIZE, total=total, trajectory=make_trajectory(versions))
        copy = self.waiting[name].members.get(number)
        self.add(copy if copy is not None and data.draw(st.booleans()) else scored)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), back=st.integers(0, 2), equal=st.integers(0, 4).map(lambda one_in_five: one_in_five == 0))
    def group_completes(self, data: st.DataObject, back: int, equal: bool) -> None:
        """All that is missing of it comes, made `back` versions ago."""
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        trajectory = make_trajectory([self.groups.versions[-1 - back :][0]])
        for number in data.draw(st.permutations(sorted(set(range(SIZE)) - self.waiting[name].members.keys()))):
            total = 0.0 if equal else float(number)
            self.add(make_scored(name, number, group_size=SIZE, total=total, trajectory=trajectory))

    @precondition(lambda self: self.gone)
    @rule(data=st.data())
    def member_comes_late(self, data: st.DataObject) -> None:
        self.groups.add(self.gone[data.draw(st.sampled_from(sorted(self.gone)))])

    @rule(number=st.integers(0, SIZE - 1))
    def stranger_comes(self, number: int) -> None:
        self.groups.add(make_scored("another/000000-0", number, group_size=SIZE))

    @rule(seconds=st.sampled_from([0.0, 3.0, 7.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.groups.expire(self.now)
        for name, group in list(self.waiting.items()):
            if self.now - group.requested_at > DEADLINE_S:
                self.dropped["late"] += 1
                self.leave(name, self.waiting.pop(name))

    @rule(count=st.integers(1, 2))
    def take(self, count: int) -> None:
        found = self.groups.take(count)
        for name, group in list(self.ready.items()):
            if not self.is_fresh(group):
                self.dropped["stale"] += 1
                self.leave(name, self.ready.pop(name))
        if len(self.ready) < count:
            assert found is None
            return
        assert found is not None
        assert [group.group_id for group in found] == list(self.ready)[:count]
        for taken in found:
            expected = self.ready.pop(taken.group_id)
            self.leave(taken.group_id, expected)
            assert taken.prompt == expected.prompt
            assert list(taken.members) == [expected.members[number] for number in range(SIZE)]
            mean = sum(expected.totals) / SIZE
            assert taken.advantages == pytest.approx([total - mean for total in expected.totals])

    @rule()
    def restart(self) -> None:
        self.groups = restored(self.groups, self.now)
        for group in self.waiting.values():
            group.requested_at = self.now

    @invariant()
    def agrees(self) -> None:
        assert self.groups.waiting + self.groups.ready <= CAPACITY
        assert self.groups.room(CAPACITY) == CAPACITY - len(self.waiting) - len(self.ready)
        assert (self.groups.waiting, self.groups.ready) == (len(self.waiting), len(self.ready))
        assert self.groups.asked() == [(name, group.prompt) for name, group in self.waiting.items()]
        assert +self.groups.dropped == +self.dropped

    def add(self, scored: TrajectoryScored) -> None:
        self.groups.add(scored)
        name = scored.completed.group_id
        group = self.waiting[name]
        group.members[scored.completed.member] = scored
        if len(group.members) < SIZE:
            assert self.groups.outcomes() == []
            return
        del self.waiting[name]
        assert self.groups.outcomes() == [(group.prompt, [group.members[number] for number in range(SIZE)])]
        if len(set(group.totals)) == 1:
            self.dropped["equal"] += 1
            self.leave(name, group)
        else:
            self.ready[name] = group

    def leave(self, name: str, group: Expected) -> None:
        if group.members:
            self.gone[name] = next(iter(group.members.values()))

    def is_fresh(self, group: Expected) -> bool:
        return group.versions <= set(self.groups.versions[-STALENESS - 1 :])


TestGroups = GroupsMachine.TestCase
TestGroups.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_staleness_counts_from_the_oldest_token() -> None:
    groups = make_groups()
    groups.versions = ["v0", "v1", "v2", "v3"]
    groups.request("g", 0, 0.0)
    for number, versions in enumerate([["v3"], ["v1", "v3"], ["v2"]]):
        groups.add(make_scored("g", number, trajectory=make_trajectory(versions)))
    (group,) = groups.whole()
    assert group.versions == {"v1", "v2", "v3"}
    assert groups.staleness(group) == 2


def test_a_foreign_version_is_never_fresh() -> None:
    groups = make_groups()
    groups.versions = ["v0"]
    groups.request("g", 0, 0.0)
    for number, versions in enumerate([["v0"], ["v0", "other"], ["v0"]]):
        groups.add(make_scored("g", number, trajectory=make_trajectory(versions)))
    assert groups.take(1) is None
    assert groups.dropped["stale"] == 1


def test_advantages_are_the_same_after_a_restart() -> None:
    groups, again = make_groups(Scale(0.1)), make_groups(Scale(0.1))
    groups.request("g", 7, 0.0)
    for number in (2, 0, 1):
        groups.add(make_scored("g", number, total=0.1 * number))
    again.restore(stored(groups.state()), 0.0)
    assert again.whole() == groups.whole()
