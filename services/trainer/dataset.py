"""Builds the examples of a run with a pool of processes, and keeps them as arrays on disk."""

import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from agentiad.v1 import trajectory_pb2 as pb
from services.data import source
from services.data.source import PROCEDURAL as PROCEDURAL
from services.data.trajectories import Demonstration
from services.trainer.batching import Example, PixelCodec, encode
from services.trainer.settings import TokenWeights
from services.vlm.render import Renderer

_CHUNK = 50


@dataclass(frozen=True)
class Recipe:
    """All that decides the examples."""

    data: str  # "procedural", or the path of a data set or of a folder that `data build` wrote
    samples: int
    seed: int
    single_pass: bool
    view: pb.ComparisonView.ValueType
    weights: TokenWeights


def labels(recipe: Recipe) -> tuple[str, ...]:
    """What the vision pretext can find in a view: something from afar, something harmless, or a defect of a type."""
    return source.labels(_source(recipe))


def categories(recipe: Recipe) -> tuple[str, ...]:
    return source.categories(_source(recipe))


def demonstration(index: int, recipe: Recipe) -> Demonstration:
    """The index-th episode of a recipe. Raises BadDataError."""
    return source.demonstration(index, _source(recipe))


def texts(recipe: Recipe, count: int) -> Iterator[str]:
    """What is said and shown in the first `count` episodes; a tokenizer is trained on it."""
    for index in range(count):
        for turn in demonstration(index, recipe).trajectory.turns:
            for segment in turn.message.segments:
                if segment.HasField("text"):
                    yield segment.text
        yield from ("system\n", "user\n", "assistant\n", "\n")


def build(recipe: Recipe, checkpoint: Path, cache: Path, workers: int, done: Callable[[int], None]) -> list[Example]:
    """Examples in order; those that `cache` holds already are read from it. `done` hears of each chunk's size."""
    cache.mkdir(parents=True, exist_ok=True)
    jobs = [
        (first, min(first + _CHUNK, recipe.samples), recipe, checkpoint, cache)
        for first in range(0, recipe.samples, _CHUNK)
    ]
    examples: list[Example] = []
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for path in pool.map(_build_chunk, jobs):
            chunk = pickle.loads(path.read_bytes())
            examples += chunk
            done(len(chunk))
    return examples


def marks_of(demo: Demonstration, names: tuple[str, ...]) -> npt.NDArray[np.float32]:
    """[m, 6]: image, label, box; the form of Example.marks."""
    rows = [(image, names.index(mark.label), *mark.box) for image, view in enumerate(demo.views) for mark in view.marks]
    return np.asarray(rows, np.float32).reshape(-1, 6)


def _source(recipe: Recipe) -> source.Source:
    return source.Source(recipe.data, recipe.seed, recipe.view, recipe.single_pass)


def _build_chunk(job: tuple[int, int, Recipe, Path, Path]) -> Path:
    first, last, recipe, checkpoint, cache = job
    path = cache / f"{first:07d}.pickle"
    if path.exists():
        return path
    # One core a process: the pool is the parallelism.
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    renderer, codec = _renderer(checkpoint)
    examples, names = [], labels(recipe)
    for index in range(first, last):
        demo = demonstration(index, recipe)
        images = [view.image for view in demo.views]
        marks = marks_of(demo, names)
        examples.append(encode(demo.trajectory, images, demo.imitate, marks, renderer, codec, recipe.weights))
    partial = path.with_suffix(".partial")
    partial.write_bytes(pickle.dumps(examples, protocol=pickle.HIGHEST_PROTOCOL))
    partial.rename(path)
    return path


@lru_cache(maxsize=1)
def _renderer(checkpoint: Path) -> tuple[Renderer, PixelCodec]:
    renderer = Renderer.from_checkpoint(checkpoint)
    return renderer, PixelCodec(renderer.processor.image_processor)
