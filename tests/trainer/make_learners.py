"""Small learners and random rollouts for them. Run by torchrun, it trains as `trained` does, on several ranks:

    torchrun --nproc-per-node 2 -m tests.trainer.make_learners FOLDER

FOLDER/lessons.pt holds the lessons by name; rank 0 writes what came of them to FOLDER/learnt.pt.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.trainer import parallel
from services.trainer.batching import Example
from services.trainer.learner import Learner, Rollout, make_learner
from services.trainer.parallel import Call, Team, World
from services.trainer.settings import RlSettings
from services.vlm.render import Renderer

ONE = World(torch.device("cpu"))
# Of each step: more ranks than rollouts, shares that differ, and more than one micro-batch each.
BATCHES = (5, 1, 6)


@dataclass(frozen=True)
class Lesson:
    """From `state`, if there is one, a step for each batch, of so many rollouts; then a version is saved to `out`."""

    settings: RlSettings
    batches: Sequence[int]
    out: Path
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class Learnt:
    metrics: list[dict[str, float]]
    state: dict[str, Any]


def make_lesson(
    base: Path, out: Path, batches: Sequence[int] = BATCHES, state: dict[str, Any] | None = None, **changes: object
) -> Lesson:
    values = {"out": out, "base": base, "micro_batch": 2, "adam_lr": 1e-3, "warmup_updates": 1, "steps": 4}
    return Lesson(RlSettings.model_validate({**values, **changes}), batches, out, state)


def make_rollout(renderer: Renderer, seed: int) -> Rollout:
    """One or two random images among random words, of which some were chosen."""
    random = np.random.default_rng(seed)
    images, words = 1 + seed % 2, 12 + 9 * (seed % 4)
    side, patch = 4, renderer.processor.image_processor.patch_size
    ids = random.integers(0, 250, words).tolist()
    for _ in range(images):  # each between words
        ids[2:2] = [7, *[renderer.image_token_id] * (side * side // 4)]
    chosen = np.zeros(len(ids), np.float32)
    chosen[-8 - seed % 3 :] = 1
    behaviour = np.where(chosen > 0, random.uniform(-12, -2, len(ids)), np.nan).astype(np.float32)
    example = Example(
        np.asarray(ids, np.int32),
        chosen,
        random.integers(0, 256, (images * side * side, 3 * patch * patch), np.uint8),
        np.asarray([[1, side, side]] * images),
        np.zeros((0, 6), np.float32),
        behaviour,
    )
    return Rollout(example, float(random.normal()))


def make_rollouts(renderer: Renderer, count: int, seed: int = 0) -> list[Rollout]:
    return [make_rollout(renderer, 100 * seed + number) for number in range(count)]


def trained(learner: Learner | Team, renderer: Renderer, lesson: Lesson) -> Learnt:
    if lesson.state is not None:
        learner.restore(lesson.state)
    done = 0 if lesson.state is None else lesson.state["updates"]
    metrics = [
        learner.step(make_rollouts(renderer, count, done + step), (done + step) / lesson.settings.steps)
        for step, count in enumerate(lesson.batches)
    ]
    learner.save(lesson.settings.base, lesson.out)
    return Learnt(metrics, learner.state())


def alone(lesson: Lesson) -> Learnt:
    """On one rank, in this process."""
    torch.set_num_threads(1)
    renderer = Renderer.from_checkpoint(lesson.settings.base)
    return trained(make_learner(lesson.settings, renderer, ONE), renderer, lesson)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    lessons: dict[str, Lesson] = torch.load(folder / "lessons.pt", weights_only=False)
    with parallel.joined(60.0) as world:
        learnt = {}
        for name, lesson in lessons.items():
            renderer = Renderer.from_checkpoint(lesson.settings.base)
            learner = make_learner(lesson.settings, renderer, world)
            print(f"rank {world.rank} begins {name}", flush=True)
            if world.rank == 0:
                learnt[name] = vars(trained(Team(learner, world), renderer, lesson))
                torch.save(learnt, folder / "learnt.pt")
                world.call([Call("end")] * world.size)
            else:
                parallel.follow(learner, world)
        if world.rank > 0:
            world.called()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
