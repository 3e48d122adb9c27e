"""A run's folder: taken by one run, whole or not at all."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from services.chassis.errors import BadInput

_IDENTITY = "settings"


class OccupiedError(BadInput):
    """The folder belongs to another run; the text says what to do."""


def check(out: Path, identity: str, aside: Collection[str] = ()) -> None:
    """`identity`: all that decides the run's outcome. `aside`: what may lie in the folder all the same. Writes nothing.

    Raises OccupiedError.
    """
    work = out / "work"
    if out.exists() and not out.is_dir():
        raise OccupiedError(f"{out} is a file: choose another folder")
    others = sorted({path.name for path in out.iterdir()} - set(aside)) if out.exists() else []
    if others and not work.exists():
        what = "a checkpoint" if (out / "config.json").exists() else f"something else ({others[0]})"
        raise OccupiedError(f"{out} holds {what} already: choose another folder")
    file = work / _IDENTITY
    if file.exists() and file.read_text() != identity:
        raise OccupiedError(f"{out} holds a run with other settings ({file}): choose another folder")


def occupy(out: Path, identity: str, aside: Collection[str] = ()) -> Path:
    """Takes the folder, or finds that this run has it already; returns OUT/work. Raises OccupiedError."""
    check(out, identity, aside)
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    (work / _IDENTITY).write_text(identity)
    return work


def check_checkpoint(folder: Path) -> None:
    """Raises BadInput: the folder is no checkpoint."""
    if not (folder / "config.json").is_file():
        raise BadInput(f"{folder} holds no checkpoint (config.json is missing)")
