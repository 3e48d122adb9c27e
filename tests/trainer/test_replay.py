"""Training from the past of a topic: without any agent, and the same however often it is killed."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.rl_stack import BASE, PATIENCE_S, command, last_step, metrics_of, trained_groups

pytestmark = pytest.mark.timeout(600)

AGENTIAD = Path(sys.executable).with_name("agentiad")
STEPS = 10
# Shorter than the writing of a checkpoint, which kills must hit.
_LOOK_S = 0.001


@dataclass(frozen=True)
class Recording:
    """A run that was, on the embedded bus, with whole groups for `STEPS` steps of one group each."""

    run_id: str
    environment: dict[str, str]


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Recording:
    folder = tmp_path_factory.mktemp("recording")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_THREADS": "1", "DATA_DIR": str(folder / "data")}
    argv = command(AGENTIAD, "train", "rl", out=folder / "run", steps=STEPS // 2)
    with (folder / "log").open("wb") as log:
        status = subprocess.run(argv, env=environment, stdout=log, stderr=log).returncode
    assert status == 0, (folder / "log").read_text(errors="replace")[-3000:]
    return Recording((folder / "run" / "work" / "run").read_text(), environment)


def begin(recording: Recording, out: Path) -> subprocess.Popen[bytes]:
    """A replay, or what is left of one. Nothing but the trainer runs."""
    argv = command(AGENTIAD, "train", "rl", "--replay", recording.run_id, out=out, steps=STEPS, groups=1)
    with out.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(argv, env=recording.environment, stdout=log, stderr=log)


def end(process: subprocess.Popen[bytes], out: Path) -> str:
    """What it said, when it has ended well."""
    status = process.wait(PATIENCE_S)
    said = out.with_suffix(".log").read_text(errors="replace")
    assert status == 0, said[-3000:]
    return said


def kill_when(process: subprocess.Popen[bytes], out: Path, step: int, is_time: Callable[[], bool]) -> None:
    """Once it has told the step."""
    deadline = time.monotonic() + PATIENCE_S
    while last_step(out) < step or not is_time():
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(_LOOK_S)  # nothing tells us when another process writes a file
    process.kill()
    process.wait()


def learnt(out: Path) -> list[torch.Tensor]:
    """Every parameter, and all that the optimizers remember, in the order of the checkpoint."""
    return list(tensors(torch.load(out / "work" / "state.pt", weights_only=True)["learner"]))


def tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


def test_a_killed_replay_ends_as_an_undisturbed_one(recording: Recording, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    end(begin(recording, whole), whole)
    # While a checkpoint is written, while a version is, and just after a step was told.
    moments: list[Callable[[], bool]] = [
        (killed / "work" / "state.partial").exists,
        lambda: any((killed / "versions").glob(".*")),
        lambda: True,
    ]
    for is_time in moments:
        step = last_step(killed) + random.randint(1, 2)
        kill_when(begin(recording, killed), killed, step, is_time)
        print(f"killed at step {last_step(killed)}")
    end(begin(recording, killed), killed)

    found, expected = learnt(killed), learnt(whole)
    assert len(found) == len(expected) > 3 * len(load_file(BASE / "model.safetensors"))  # AdamW keeps two of each
    assert all(map(torch.equal, found, expected))
    assert newest(killed).name == newest(whole).name
    assert (newest(killed) / "model.safetensors").read_bytes() == (newest(whole) / "model.safetensors").read_bytes()
    assert trained_groups(killed) == trained_groups(whole)
    assert [timeless(row) for row in metrics_of(killed)] == [timeless(row) for row in metrics_of(whole)]
    assert [row["step"] for row in metrics_of(killed)] == list(range(1, STEPS + 1))
    assert not list((killed / "versions").glob(".*"))


def test_a_run_that_the_topic_does_not_hold_is_not_replayed(recording: Recording, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = begin(replace(recording, run_id="0123456789ab"), out)
    assert process.wait(PATIENCE_S) == 2
    said = " ".join(out.with_suffix(".log").read_text().split())
    assert "of run '0123456789ab' the topic agentiad.scored-trajectories.v1 holds 0 whole groups" in said
    assert "Traceback" not in said


def newest(out: Path) -> Path:
    return max((out / "versions").iterdir())


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not name.startswith(("speed/", "idle/"))}
