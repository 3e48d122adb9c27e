"""What an RL run leaves to be looked at: its metrics as JSON Lines and for TensorBoard, and a few of its rollouts.

    folder/metrics.jsonl            a line a step: {"step": 7, "reward/total": 0.52, …}; null for what is no number
    folder/tensorboard/             the same scalars
    folder/rollouts/STEP-RANK.pb    a TrajectoryScored each

Invariant: once a journal is open, the folder holds nothing of the steps from `resumed_step` on, so that a run which was
killed and goes on from its last checkpoint tells each step once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agentiad.v1.events_pb2 import TrajectoryScored

METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
ROLLOUTS = "rollouts"
# Two pairs a step, ten steps and the first: some 40 rollouts a run, as many as a person will look at.
_PAIRS = 2
_KEPT_STEPS = 10
# For the terminal: metric, word and format, in their order.
_SUMMARY: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("reward/total", "reward", "{:.2f}".format),
    ("accuracy/sampled", "right", "{:.0%}".format),
    ("tools/crop_rate", "zoom", "{:.0%}".format),
    ("tools/query_rate", "compare", "{:.0%}".format),
    ("staleness/mean", "stale", "{:.1f}".format),
    ("idle/trainer", "idle", "{:.0%}".format),
)


@dataclass(frozen=True)
class Kept:
    """A rollout of a step; `name` is that of its file, without the suffix."""

    name: str
    step: int
    scored: TrajectoryScored


class Journal:
    """Of one run; one process writes it."""

    def __init__(self, folder: Path, steps: int, resumed_step: int = 0) -> None:
        """`steps`: how many the run will have. `resumed_step`: the first that will be recorded (again). OSError."""
        # It takes seconds to import and only a trainer needs it.
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self._rollouts = folder / ROLLOUTS
        self._stride = max(1, math.ceil(steps / _KEPT_STEPS))
        _cut_metrics(folder / METRICS, resumed_step)
        for path in self._rollouts.glob("*.pb"):
            if _step_of(path) >= resumed_step:
                path.unlink()
        self._lines = (folder / METRICS).open("a", encoding="utf-8")
        # purge_step tells TensorBoard to forget what earlier files hold of the steps from there on.
        self._board = SummaryWriter(str(folder / TENSORBOARD), purge_step=resumed_step)

    def record(self, step: int, metrics: Mapping[str, float]) -> None:
        """On disk when it returns, as far as a killed process goes. Names: words with slashes between them."""
        numbers = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._lines.write(json.dumps({"step": step, **numbers}) + "\n")
        self._lines.flush()
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def keep(self, step: int, scored: Sequence[TrajectoryScored]) -> None:
        """Stores a few of a step's rollouts, if it is one of the steps that are kept: the first, then every k-th."""
        if step != 1 and step % self._stride:
            return
        self._rollouts.mkdir(exist_ok=True)
        for rank, each in enumerate(_telling(scored)):
            path = self._rollouts / f"{step:06d}-{rank}.pb"
            partial = path.with_suffix(".partial")
            partial.write_bytes(each.SerializeToString())
            os.replace(partial, path)

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def kept(folder: Path) -> list[Kept]:
    """The rollouts that a run's journal keeps so far, by step, in each the best of a group before its worst."""
    paths = sorted((folder / ROLLOUTS).glob("*.pb"), key=lambda path: (_step_of(path), path.name))
    return [Kept(path.stem, _step_of(path), TrajectoryScored.FromString(path.read_bytes())) for path in paths]


def summary(metrics: Mapping[str, float]) -> str:
    """A step in a few words, for a progress bar. What is missing or no number is left out."""
    known = [(word, form(metrics[name])) for name, word, form in _SUMMARY if math.isfinite(metrics.get(name, math.nan))]
    return "  ".join(f"{word} {value}" for word, value in known)


def _telling(scored: Sequence[TrajectoryScored]) -> list[TrajectoryScored]:
    """Best and worst of the groups whose rewards lie furthest apart: what a policy learns from. Of equals, one."""
    groups: dict[str, list[TrajectoryScored]] = {}
    for each in scored:
        groups.setdefault(each.completed.group_id, []).append(each)
    pairs = [(max(members, key=_total), min(members, key=_total)) for members in groups.values()]
    pairs.sort(key=_spread, reverse=True)
    return [each for pair in pairs[:_PAIRS] for each in (pair if _spread(pair) else pair[:1])]


def _spread(pair: tuple[TrajectoryScored, TrajectoryScored]) -> float:
    return _total(pair[0]) - _total(pair[1])


def _total(scored: TrajectoryScored) -> float:
    return scored.reward.total


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[0])


def _cut_metrics(path: Path, resumed_step: int) -> None:
    """Leaves the whole lines of earlier steps; the last line may be torn."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line for line in whole if json.loads(line)["step"] < resumed_step), encoding="utf-8")
    os.replace(partial, path)
