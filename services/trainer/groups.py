"""The groups of rollouts that a trainer has asked for, and what became of them. Pure; a checkpoint holds it whole.

    request ──▶ waiting ──(last member)──▶ ready ──▶ taken
                   │                         └──▶ dropped: stale (too old a policy, or none of this run)
                   └──▶ dropped: late (past its deadline), equal (all rewards the same)

Invariants: a group is taken whole or not at all, and once at most; waiting and ready groups together never exceed the
capacity that `room` was asked for; each dropped group makes room for another one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentiad.v1.events_pb2 import TrajectoryScored
from services.trainer.advantage import Scale, advantages, tail_advantages


@dataclass(frozen=True)
class Group:
    """`members` in their order; `advantages` beside them; `tail_advantages` of what each said after its verdict, where
    that has some of its own.
    """

    group_id: str
    prompt: int
    members: Sequence[TrajectoryScored]
    advantages: Sequence[float]
    tail_advantages: Sequence[float] | None = None

    @property
    def versions(self) -> set[str]:
        """Every policy version that chose one of its tokens."""
        turns = (turn for scored in self.members for turn in scored.completed.trajectory.turns)
        return {turn.generation.policy_version for turn in turns if turn.HasField("generation")}


@dataclass
class _Waiting:
    prompt: int
    requested_at: float
    members: dict[int, TrajectoryScored] = field(default_factory=dict)


class Groups:
    """`max_staleness`: how many versions a group's oldest token may lie behind the newest one; `deadline_s`: how long a
    group may take from its request to its last member; `tail`: components of the reward that the words after a verdict
    can change, none: they share the advantage of the whole.
    """

    def __init__(
        self, *, max_staleness: int, deadline_s: float, scale: Scale | None = None, tail: Sequence[str] = ()
    ) -> None:
        self._max_staleness, self._deadline_s, self._scale = max_staleness, deadline_s, scale
        self._tail = tail
        self._waiting: dict[str, _Waiting] = {}
        self._ready: list[Group] = []
        self.versions: list[str] = []  # in the order of their publication
        self.dropped: Counter[str] = Counter()
        self._outcomes: list[tuple[int, Sequence[TrajectoryScored]]] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def ready(self) -> int:
        return len(self._ready)

    def asked(self) -> list[tuple[str, int]]:
        """(group id, prompt) of the groups that are waited for."""
        return [(group_id, waiting.prompt) for group_id, waiting in self._waiting.items()]

    def whole(self) -> list[Group]:
        """All that are ready, whatever their versions."""
        ready, self._ready = self._ready, []
        return ready

    def room(self, capacity: int) -> int:
        """How many more groups may be requested."""
        return max(0, capacity - len(self._waiting) - len(self._ready))

    def request(self, group_id: str, prompt: int, now: float) -> None:
        self._waiting[group_id] = _Waiting(prompt, now)

    def add(self, scored: TrajectoryScored) -> None:
        """A member has come. What nobody waits for (another run's, a copy, one of a dropped group) is ignored."""
        completed = scored.completed
        waiting = self._waiting.get(completed.group_id)
        if waiting is None:
            return
        waiting.members[completed.member] = scored
        if len(waiting.members) < completed.group_size:
            return
        del self._waiting[completed.group_id]
        members = [waiting.members[member] for member in sorted(waiting.members)]
        self._outcomes.append((waiting.prompt, members))
        group = self._compared(completed.group_id, waiting.prompt, members)
        if group is None:
            self.dropped["equal"] += 1
        else:
            self._ready.append(group)

    def _compared(self, group_id: str, prompt: int, members: Sequence[TrajectoryScored]) -> Group | None:
        """None: their rewards are equal."""
        tails = [sum(member.reward.components.get(name, 0.0) for name in self._tail) for member in members]
        heads = [member.reward.total - tail for member, tail in zip(members, tails, strict=True)]
        found = advantages(heads, self._scale)
        after = tail_advantages(tails, [right(member) for member in members], self._scale) if self._tail else None
        if found is None and not any(after or []):
            return None
        return Group(group_id, prompt, members, found or [0.0] * len(members), after)

    def outcomes(self) -> list[tuple[int, Sequence[TrajectoryScored]]]:
        """(prompt, members) of the groups that were completed since the last call, dropped ones too."""
        outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def expire(self, now: float) -> None:
        """Drops what is past its deadline."""
        late = [name for name, waiting in self._waiting.items() if now - waiting.requested_at > self._deadline_s]
        for name in late:
            del self._waiting[name]
        self.dropped["late"] += len(late)

    def take(self, count: int) -> list[Group] | None:
        """The `count` groups that were ready first, none of them stale; None while there are not so many."""
        fresh = [group for group in self._ready if self.staleness(group) <= self._max_staleness]
        self.dropped["stale"] += len(self._ready) - len(fresh)
        self._ready = fresh
        if len(fresh) < count:
            return None
        self._ready = fresh[count:]
        return fresh[:count]

    def staleness(self, group: Group) -> float:
        """How many versions its oldest token lies behind the newest one; infinite: made by a foreign version."""
        if not group.versions or not group.versions <= set(self.versions):
            return float("inf")
        return len(self.versions) - 1 - min(self.versions.index(version) for version in group.versions)

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain values and bytes."""
        return {
            "versions": list(self.versions),
            "dropped": dict(self.dropped),
            "waiting": [(name, item.prompt, _stored(item.members.values())) for name, item in self._waiting.items()],
            "ready": [(group.group_id, group.prompt, _stored(group.members)) for group in self._ready],
        }

    def restore(self, state: dict[str, Any], now: float) -> None:
        """Puts a checkpoint's state in place; deadlines of waiting groups begin anew."""
        self.versions = list(state["versions"])
        self.dropped = Counter(state["dropped"])
        for name, prompt, stored in state["waiting"]:
            members = {scored.completed.member: scored for scored in map(TrajectoryScored.FromString, stored)}
            self._waiting[name] = _Waiting(prompt, now, members)
        for name, prompt, stored in state["ready"]:
            members_ = [TrajectoryScored.FromString(value) for value in stored]
            group = self._compared(name, prompt, members_)
            assert group is not None  # or it would not have been ready
            self._ready.append(group)


def right(scored: TrajectoryScored) -> bool:
    """The verdict is there and true."""
    trajectory = scored.completed.trajectory
    truth = scored.completed.ground_truth.anomaly_present
    return trajectory.HasField("verdict") and trajectory.verdict.anomaly_present == truth


def _stored(members: Iterable[TrajectoryScored]) -> list[bytes]:
    return [member.SerializeToString(deterministic=True) for member in members]
