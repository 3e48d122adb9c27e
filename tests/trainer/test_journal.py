"""What a run leaves to be looked at, told once a step whatever killed it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agentiad.v1.events_pb2 import TrajectoryCompleted, TrajectoryScored
from agentiad.v1.reward_pb2 import Reward
from services.trainer import journal
from services.trainer.journal import Journal, kept


def make_scored(group: str, rewards: list[float]) -> list[TrajectoryScored]:
    return [
        TrajectoryScored(
            event_id=f"{group}/{i}",
            completed=TrajectoryCompleted(group_id=group, member=i, group_size=len(rewards)),
            reward=Reward(total=total),
        )
        for i, total in enumerate(rewards)
    ]


def make_run(folder: Path, steps: int) -> Journal:
    """A run of 20 steps after `steps` of them, its journal open. Who drops it closes its files, as a kill would not."""
    run = Journal(folder, 20)
    for step in range(1, steps + 1):
        run.record(step, {"reward/total": step / 10})
        run.keep(step, make_scored(f"g{step}", [0.0, 1.0]))
    return run


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / journal.METRICS).read_text().splitlines()]


def on_board(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard shows of a metric."""
    board = EventAccumulator(str(folder / journal.TENSORBOARD))
    board.Reload()
    return [(event.step, round(event.value, 4)) for event in board.Scalars(name)]


def test_each_step_is_a_line_and_a_point_before_the_journal_is_closed(tmp_path: Path) -> None:
    run = make_run(tmp_path, 2)
    assert lines(tmp_path) == [{"step": 1, "reward/total": 0.1}, {"step": 2, "reward/total": 0.2}]
    assert on_board(tmp_path, "reward/total") == [(1, 0.1), (2, 0.2)]
    run.close()


def test_a_resumed_run_tells_each_step_once(tmp_path: Path) -> None:
    killed = make_run(tmp_path, 6)
    with (tmp_path / journal.METRICS).open("a") as stream:
        stream.write('{"step": 7, "rew')  # the kill came while it was written
    run = Journal(tmp_path, 20, resumed_step=4)
    assert [row["step"] for row in lines(tmp_path)] == [1, 2, 3]
    assert {each.step for each in kept(tmp_path)} == {1, 2}
    run.record(4, {"reward/total": 4.4})
    run.keep(4, make_scored("again", [0.5, 0.6]))
    run.close()
    assert [(row["step"], row["reward/total"]) for row in lines(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 4.4)]
    assert on_board(tmp_path, "reward/total") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 4.4)]
    assert [each.scored.event_id for each in kept(tmp_path) if each.step >= 4] == ["again/1", "again/0"]
    killed.close()


def test_a_torn_line_is_cut_also_where_no_step_is_repeated(tmp_path: Path) -> None:
    make_run(tmp_path, 2).close()
    path = tmp_path / journal.METRICS
    path.write_bytes(path.read_bytes() + '{"step": 3, "größe'.encode()[:-2])
    run = Journal(tmp_path, 20, resumed_step=3)
    run.record(3, {"a": 1.0})
    run.close()
    assert lines(tmp_path)[1:] == [{"step": 2, "reward/total": 0.2}, {"step": 3, "a": 1.0}]


def test_a_new_run_begins_with_nothing(tmp_path: Path) -> None:
    make_run(tmp_path, 3).close()
    Journal(tmp_path, 20).close()
    assert lines(tmp_path) == []
    assert kept(tmp_path) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_null(tmp_path: Path, value: float) -> None:
    run = Journal(tmp_path, 1)
    run.record(1, {"policy/kl": value, "policy/entropy": 0.5})
    run.close()
    assert lines(tmp_path) == [{"step": 1, "policy/kl": None, "policy/entropy": 0.5}]


def test_best_and_worst_of_the_groups_that_differ_most_are_kept(tmp_path: Path) -> None:
    run = Journal(tmp_path, 1)
    groups = {"near": [0.4, 0.5, 0.45], "far": [0.2, 1.0, 0.1], "equal": [0.3, 0.3], "mid": [0.9, 0.2]}
    run.keep(1, [each for group, rewards in groups.items() for each in make_scored(group, rewards)])
    run.close()
    assert [each.scored.event_id for each in kept(tmp_path)] == ["far/1", "far/2", "mid/0", "mid/1"]
    assert kept(tmp_path)[0].scored.completed.group_size == 3


def test_of_a_group_of_equals_one_is_kept(tmp_path: Path) -> None:
    run = Journal(tmp_path, 1)
    run.keep(1, make_scored("g", [0.3, 0.3, 0.3]))
    run.keep(1, [])
    run.close()
    assert len(kept(tmp_path)) == 1


@pytest.mark.parametrize("steps", [1, 7, 19, 20, 120, 999, 5000])
def test_some_forty_are_kept_of_a_run_of_any_length_from_its_first_step_on(tmp_path: Path, steps: int) -> None:
    run = Journal(tmp_path, steps)
    for step in range(1, steps + 1):
        run.keep(step, [*make_scored("a", [0.0, 1.0]), *make_scored("b", [0.0, 1.0])])
    run.close()
    shown = sorted({each.step for each in kept(tmp_path)})
    assert shown[0] == 1
    assert len(kept(tmp_path)) == 4 * len(shown)
    assert min(steps, 8) <= len(shown) <= 11
    assert steps - shown[-1] < max(1, steps / 10)


def test_the_summary_says_what_is_known() -> None:
    metrics = {
        "reward/total": 0.523, "accuracy/sampled": 0.81, "tools/crop_rate": 0.634, "tools/query_rate": 0.2,
        "staleness/mean": 0.42, "idle/trainer": 0.12, "policy/kl": 0.1,
    }  # fmt: skip
    assert journal.summary(metrics) == "reward 0.52  right 81%  zoom 63%  compare 20%  stale 0.4  idle 12%"
    assert journal.summary({"reward/total": 0.5, "accuracy/sampled": math.nan}) == "reward 0.50"
    assert journal.summary({}) == ""
