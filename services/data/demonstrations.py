"""Demonstrations on disk: one JSON line an episode, and the images that it shows, each named by its digest.

    DIR/build.json              what the set is: its making, its labels, its categories
    DIR/demonstrations.jsonl    episode i on line i; only ever appended to
    DIR/images/<sha256>.png     pixels, without loss

Invariants: a line's images are whole before the line is written; a line without its newline is no episode.
Raises BadDataError with the file and the line that cannot be read.
"""

import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.protobuf import json_format
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.data.readers import BadDataError
from services.data.trajectories import Demonstration, Mark, View

MANIFEST = "build.json"
EPISODES = "demonstrations.jsonl"
IMAGES = "images"
VIEWS = {"composite": pb.COMPARISON_VIEW_COMPOSITE, "side-by-side": pb.COMPARISON_VIEW_SIDE_BY_SIDE}

_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class StoredView:
    sha256: str  # of the PNG file
    marks: tuple[Mark, ...]


@dataclass
class Episode:
    """A demonstration whose pixels lie in files."""

    trajectory: pb.Trajectory
    truth: pb.GroundTruth
    imitate: list[bool]
    views: list[StoredView]
    # How its thoughts were written (the fields of thoughts.Tally); empty where nobody was asked.
    thoughts: dict[str, Any]

    def line(self) -> str:
        return json.dumps(
            {
                "trajectory": json_format.MessageToDict(self.trajectory, preserving_proto_field_name=True),
                "truth": json_format.MessageToDict(self.truth, preserving_proto_field_name=True),
                "imitate": self.imitate,
                "views": [
                    {"sha256": view.sha256, "marks": [[mark.label, *mark.box] for mark in view.marks]}
                    for view in self.views
                ],
                "thoughts": self.thoughts,
            },
            separators=(",", ":"),
        )


class StoredSet:
    """A finished set, read an episode at a time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            self.labels = tuple(str(label) for label in manifest["labels"])
            self.categories = tuple(str(category) for category in manifest["categories"])
            self.view = VIEWS[manifest["view"]]
            self._offsets = _line_starts(folder / EPISODES)
            wanted = int(manifest["samples"])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise BadDataError(f"{folder / MANIFEST}: {type(error).__name__}: {error}") from error
        if len(self) != wanted:
            raise BadDataError(f"{folder} holds {len(self)} of {wanted} episodes: run the same `data build` again")

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> Demonstration:
        start, end = self._offsets[index], self._offsets[index + 1]
        path = self.folder / EPISODES
        try:
            with path.open("rb") as lines:
                lines.seek(start)
                return load(parse(lines.read(end - start)), self.folder)
        except (OSError, KeyError, TypeError, ValueError, json_format.ParseError) as error:
            raise BadDataError(f"{path}, line {index + 1}: {type(error).__name__}: {error}") from error


def store(demo: Demonstration, folder: Path) -> Episode:
    """Writes the images that are not there yet."""
    views = [StoredView(_write_image(view.image, folder / IMAGES), view.marks) for view in demo.views]
    return Episode(demo.trajectory, demo.truth, demo.imitate, views, {})


def load(episode: Episode, folder: Path) -> Demonstration:
    """The demonstration as it was before `store`."""
    views = []
    for view in episode.views:
        with Image.open(image_path(folder, view.sha256)) as opened:
            views.append(View(opened.convert("RGB"), view.marks))
    return Demonstration(episode.trajectory, episode.truth, views, episode.imitate)


def parse(line: str | bytes) -> Episode:
    """Raises KeyError, TypeError, ValueError or json_format.ParseError."""
    row = json.loads(line)
    return Episode(
        json_format.ParseDict(row["trajectory"], pb.Trajectory()),
        json_format.ParseDict(row["truth"], pb.GroundTruth()),
        [bool(learn) for learn in row["imitate"]],
        [StoredView(view["sha256"], tuple(_mark(*mark) for mark in view["marks"])) for view in row["views"]],
        dict(row["thoughts"]),
    )


def read_episodes(folder: Path) -> Iterator[Episode]:
    """Those that are written so far, without pixels."""
    with (folder / EPISODES).open("rb") as lines:
        yield from map(parse, lines)


def cut_torn_line(path: Path) -> int:
    """Removes what follows the last newline, if anything; how many lines are left. The file must exist."""
    starts = _line_starts(path)
    os.truncate(path, starts[-1])
    return len(starts) - 1


def image_path(folder: Path, sha256: str) -> Path:
    """Raises ValueError: a name that is no digest could lead out of the folder."""
    if not _DIGEST.fullmatch(sha256):
        raise ValueError(f"{sha256!r} is no digest")
    return folder / IMAGES / f"{sha256}.png"


def write_whole(path: Path, content: bytes) -> None:
    """Other processes see all of the file or none of it."""
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _write_image(image: Image.Image, folder: Path) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    sha256 = hashlib.sha256(buffer.getvalue()).hexdigest()
    path = folder / f"{sha256}.png"
    if not path.exists():
        write_whole(path, buffer.getvalue())
    return sha256


def _mark(label: str, x_min: float, y_min: float, x_max: float, y_max: float) -> Mark:
    return Mark(label, (x_min, y_min, x_max, y_max))


def _line_starts(path: Path) -> list[int]:
    """[lines + 1] byte offsets: where each whole line starts, and where the last one ends."""
    with path.open("rb") as lines:
        return [0, *itertools.accumulate(len(line) for line in lines if line.endswith(b"\n"))]
