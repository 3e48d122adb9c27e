"""Builds a set of demonstrations in a folder, chunk by chunk; killed at any moment, the same command goes on.

Processes make the episodes and their images; this one has the thoughts written, where that is asked for, and appends.
"""

import asyncio
import fcntl
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import cv2
from pydantic import BaseModel, ConfigDict, Field

from services.agent import protocol
from services.agent.episode import tools_used
from services.chassis.errors import BadInput
from services.data import demonstrations, source, thoughts
from services.data.demonstrations import EPISODES, IMAGES, MANIFEST, Episode
from services.data.endpoint import EndpointSettings
from services.data.probe import Probe, probe
from services.data.readers import BadDataError
from services.data.source import Source
from services.data.words import Words

ANSWERS = "thoughts"  # what the endpoint answered, by request
_CHUNK = 50


class BuildSettings(BaseModel):
    model_config = ConfigDict(frozen=True)

    out: Path
    data: str = source.PROCEDURAL  # or what readers.read takes
    samples: int = Field(ge=1)
    seed: int = 0
    view: Literal["composite", "side-by-side"] = "composite"  # as the checkpoint that will learn sees comparisons
    thoughts_model: str | None = None  # who writes the thoughts; None: the templates stay

    def source(self) -> Source:
        return Source(self.data, self.seed, demonstrations.VIEWS[self.view], words=Words.VARIED)

    def manifest(self) -> str:
        """All that decides the episodes, and what a reader wants to know of them, as JSON."""
        made = self.model_dump(mode="json", exclude={"out"})
        labels, categories = source.labels(self.source()), source.categories(self.source())
        return json.dumps({**made, "labels": labels, "categories": categories}, indent=1) + "\n"


class OccupiedError(BadInput):
    """The folder belongs to another build; the text says what to do."""


@dataclass
class Summary:
    """What a set holds, whichever runs built it."""

    episodes: int = 0
    anomalous: int = 0
    perceptive: int = 0  # looked closer, compared with nothing
    comparative: int = 0
    written: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    # Of the thoughts before the first call of a tool; None: too few to tell.
    probe: Probe | None = None


def build(
    settings: BuildSettings, endpoint: EndpointSettings | None = None, done: Callable[[int], None] = lambda _: None
) -> Summary:
    """Builds what is missing. `done` hears how many episodes were found, then of each chunk's size.

    Raises BadDataError, OccupiedError, and with an endpoint its errors: what is written by then stays.
    """
    if source.is_built(settings.data):
        raise BadDataError(f"{settings.data} is a built set already: give the data that it was built from")
    _occupy(settings.out, settings.manifest())
    kinds = source.labels(settings.source())[2:]
    with _appending(settings.out / EPISODES) as file:
        found = demonstrations.cut_torn_line(settings.out / EPISODES)
        done(found)
        for episodes in _made(settings, found):
            if endpoint is not None:
                answers = settings.out / ANSWERS
                asyncio.run(thoughts.write_all(episodes, settings.out, kinds, endpoint, answers))
            file.write("".join(f"{episode.line()}\n" for episode in episodes).encode())
            file.flush()
            done(len(episodes))
    return summarise(settings.out)


def summarise(folder: Path) -> Summary:
    summary, first_thoughts = Summary(), []
    for episode in demonstrations.read_episodes(folder):
        used = tools_used(episode.trajectory)
        summary.episodes += 1
        summary.anomalous += episode.truth.anomaly_present
        summary.comparative += protocol.QUERY in used
        summary.perceptive += bool(used) and protocol.QUERY not in used
        summary.written += episode.thoughts.get("written", 0)
        summary.kept += episode.thoughts.get("kept", 0)
        summary.rejected.update(episode.thoughts.get("rejected", {}))
        first_thoughts += first_thought(episode)
    summary.probe = probe(first_thoughts)
    return summary


def first_thought(episode: Episode) -> list[tuple[str, str, bool]]:
    """What was thought before anything but the part was seen, as a row for the probe; none where no tool was called."""
    turn = next(turn for turn in episode.trajectory.turns if turn.HasField("generation"))
    thought = thoughts.thought_of(turn)
    if thought is None or not turn.HasField("tool_call"):
        return []
    return [(f"{episode.trajectory.task.category} {turn.tool_call.name}", thought, episode.truth.anomaly_present)]


def _occupy(out: Path, manifest: str) -> None:
    """Takes the folder for this build, or finds that this build has it already."""
    path = out / MANIFEST
    if path.exists():
        if path.read_text() != manifest:
            raise OccupiedError(f"{out} holds a build with other settings ({path}): choose another folder")
        return
    if out.exists() and any(not entry.name.endswith(".partial") for entry in out.iterdir()):
        raise OccupiedError(f"{out} holds something else: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    demonstrations.write_whole(path, manifest.encode())


@contextmanager
def _appending(path: Path) -> Iterator[BinaryIO]:
    """The file, for one process at a time."""
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OccupiedError(f"{path.parent} is being built by another process") from None
        yield file


def _made(settings: BuildSettings, found: int) -> Iterator[list[Episode]]:
    (settings.out / IMAGES).mkdir(exist_ok=True)
    jobs = [
        (first, min(first + _CHUNK, settings.samples), settings.source(), settings.out)
        for first in range(found, settings.samples, _CHUNK)
    ]
    if not jobs:
        return
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_die_with_parent) as pool:
        for lines in pool.map(_make_chunk, jobs):
            yield [demonstrations.parse(line) for line in lines]


def _make_chunk(job: tuple[int, int, Source, Path]) -> list[str]:
    first, last, origin, folder = job
    # One core a process: the pool is the parallelism.
    cv2.setNumThreads(1)
    return [demonstrations.store(source.demonstration(i, origin), folder).line() for i in range(first, last)]


def _die_with_parent() -> None:
    """A pool's processes wait for ever for a parent that was killed."""

    def watch() -> None:
        parent = multiprocessing.parent_process()
        assert parent is not None
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
