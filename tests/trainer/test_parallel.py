"""Two ranks over gloo against one: the same metrics, gradients, weights and checkpoints; and none waits for ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from tests.policy.checkpoints import make_tiny_checkpoint
from tests.trainer.make_learners import BATCHES, Learnt, Lesson, alone, make_lesson

PROGRAM = "tests.trainer.make_learners"
# Only so that a test that hangs fails: no rank takes a tenth of it.
PATIENCE_S = 200.0
LESSONS: dict[str, dict[str, object]] = {
    "plain": {},
    "divergence": {"kl": 0.1, "minibatches": 2},
    "recomputed": {"kl": 0.1, "gradient_checkpointing": True, "freeze_vision": True},
    "adapters": {"kl": 0.1, "lora_rank": 4, "gradient_checkpointing": True},
    "clipped": {"clip_norm": 0.1, "micro_batch": 1},
}
ROUGH: dict[str, dict[str, object]] = {
    "rough": {"kl": 0.1, "dtype": "bfloat16", "gradient_checkpointing": True},
    "rough adapters": {"kl": 0.1, "dtype": "bfloat16", "lora_rank": 4, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_tiny_checkpoint(folder / name, name) for name in ("qwen3_vl", "qwen2_5_vl")}


@pytest.fixture(scope="module")
def lessons(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Lesson]:
    """For two ranks; those of "resumed" go on from a checkpoint of one."""
    folder = tmp_path_factory.mktemp("two")
    made = {
        f"{architecture} {name}": make_lesson(base, folder / architecture / name, **changes)
        for architecture, base in bases.items()
        for name, changes in {**LESSONS, **ROUGH}.items()
    }
    for name, changes in {"resumed": {}, "resumed adapters": {"lora_rank": 4}}.items():
        state = alone(make_lesson(bases["qwen3_vl"], folder / "before", BATCHES, **changes)).state
        made[name] = make_lesson(bases["qwen3_vl"], folder / name, (3,), state, **changes)
    return made


@pytest.fixture(scope="module")
def learnt(lessons: dict[str, Lesson], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Learnt]:
    """By two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.save(lessons, folder / "lessons.pt")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", PROGRAM, str(folder)]
    subprocess.run([sys.executable, *launcher], check=True, timeout=PATIENCE_S)
    found = torch.load(folder / "learnt.pt", weights_only=True)
    return {name: Learnt(**values) for name, values in found.items()}


def moved(state: dict[str, Tensor], base: Path) -> Tensor:
    """How far each weight that is trained has come, in one vector; adapters from zero."""
    before = AutoModelForImageTextToText.from_pretrained(base).state_dict()
    return torch.cat([(state[name] - before.get(name, torch.zeros(()))).flatten() for name in sorted(state)])


@pytest.fixture
def pair(
    lessons: dict[str, Lesson], learnt: dict[str, Learnt], tmp_path: Path
) -> Callable[[str], tuple[Learnt, Learnt, Path]]:
    """What one rank and what two have learnt in a lesson, and its base."""

    def of(name: str) -> tuple[Learnt, Learnt, Path]:
        lesson = lessons[name]
        one = Lesson(lesson.settings, lesson.batches, tmp_path / "one", lesson.state)
        return alone(one), learnt[name], lesson.settings.base

    return of


Pair = Callable[[str], tuple[Learnt, Learnt, Path]]


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", LESSONS)
def test_two_ranks_learn_what_one_learns(pair: Pair, architecture: str, name: str) -> None:
    one, two, base = pair(f"{architecture} {name}")
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert two.state["model"].keys() == one.state["model"].keys()
    ours, theirs = moved(two.state["model"], base), moved(one.state["model"], base)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    assert theirs.norm() > 0.05


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("name", ROUGH)
def test_in_bfloat16_they_learn_about_the_same(pair: Pair, architecture: str, name: str) -> None:
    one, two, _ = pair(f"{architecture} {name}")
    for ours, theirs in zip(two.metrics, one.metrics, strict=True):
        for metric in ("policy/gradient_norm", "policy/entropy", "policy/mismatch_mean"):
            assert ours[metric] == pytest.approx(theirs[metric], rel=0.02)
        assert ours["policy/tokens"] == theirs["policy/tokens"]
    assert {value.dtype for value in two.state["model"].values()} == {torch.float32}


def test_the_version_of_two_ranks_is_the_one_of_one(pair: Pair, lessons: dict[str, Lesson], tmp_path: Path) -> None:
    for name in ("qwen2_5_vl plain", "qwen3_vl adapters"):
        pair(name)
        ours, theirs = (
            AutoModelForImageTextToText.from_pretrained(folder).state_dict()
            for folder in (lessons[name].out, tmp_path / "one")
        )
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(ours[key], value, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["resumed", "resumed adapters"])
def test_two_ranks_go_on_from_a_checkpoint_of_one(pair: Pair, name: str) -> None:
    one, two, base = pair(name)
    assert two.metrics[0] == pytest.approx(one.metrics[0], rel=1e-5, abs=1e-6)
    ours, theirs = moved(two.state["model"], base), moved(one.state["model"], base)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()
    assert two.state["updates"] == one.state["updates"] == len(BATCHES) + 1


@pytest.mark.parametrize("name", ["plain", "adapters"])
def test_one_rank_goes_on_from_a_checkpoint_of_two(
    pair: Pair, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    one, two, base = pair(f"qwen3_vl {name}")
    torch.save(two.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    after_two = alone(make_lesson(base, tmp_path / "after two", (4,), state, **LESSONS[name]))
    after_one = alone(make_lesson(base, tmp_path / "after one", (4,), one.state, **LESSONS[name]))
    assert after_two.metrics[0] == pytest.approx(after_one.metrics[0], rel=1e-3, abs=1e-4)
    ours, theirs = moved(after_two.state["model"], base), moved(after_one.state["model"], base)
    assert (ours - theirs).norm() < 1e-3 * theirs.norm()


@contextmanager
def two_ranks(folder: Path, lessons: dict[str, Lesson]) -> Iterator[list[subprocess.Popen[str]]]:
    """As torchrun starts them, but without its agent, which would end one when the other fails."""
    torch.save(lessons, folder / "lessons.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", PROGRAM, str(folder)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_when_rank_0_fails_the_other_ends(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lesson = make_lesson(bases["qwen3_vl"], tmp_path / "file" / "version", (2,))
    with two_ranks(tmp_path, {"first": lesson}) as ranks:
        errors = [rank.communicate(timeout=PATIENCE_S)[1] for rank in ranks]
        assert all(rank.returncode != 0 for rank in ranks)
    assert "LeaderError: NotADirectoryError" in errors[1]


def test_when_another_rank_is_killed_rank_0_ends(bases: dict[str, Path], tmp_path: Path) -> None:
    endless = make_lesson(bases["qwen3_vl"], tmp_path / "version", (2,) * 100_000, steps=100_000)
    with two_ranks(tmp_path, {"endless": endless}) as ranks:
        assert ranks[1].stdout is not None
        assert ranks[1].stdout.readline() == "rank 1 begins endless\n"
        ranks[1].kill()
        errors = ranks[0].communicate(timeout=PATIENCE_S)[1]
        assert ranks[0].returncode != 0
    assert "Connection" in errors
