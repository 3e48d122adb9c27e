"""`agentiad inspect`: files in, verdicts out, on the embedded stack."""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from agentiad.v1 import retrieval_pb2
from services.chassis import telemetry
from services.chassis.errors import BadInput
from services.cli.inspecting import Item, Outcome, find_images, inspect_all
from services.cli.report import write_report, write_trace
from services.cli.rows import COLOURS, readable, row
from services.cli.stack import Stack, embedded

console = Console(stderr=True)


def run(
    paths: list[Path], category: str, normals: Path | None, model: Path | None, as_json: bool, out: Path | None,
    data_dir: Path,
) -> int:  # fmt: skip
    """Prints a row an image; the exit status is 1 if any has no verdict."""
    telemetry.configure("cli", "WARNING")
    outcomes = asyncio.run(_run(paths, category, normals, model, as_json, out, data_dir))
    return 1 if not outcomes or any(outcome.error for outcome in outcomes) else 0


async def _run(
    paths: list[Path], category: str, normals: Path | None, model: Path | None, as_json: bool, out: Path | None,
    data_dir: Path,
) -> list[Outcome]:  # fmt: skip
    files = find_images(paths)
    if not files:
        console.print("There are no pictures in " + ", ".join(map(str, paths)))
        return []
    good = _normal_pictures(normals) if normals else []
    with ExitStack() as closing:
        # With --normals the comparison is with these only: a library of their own, gone afterwards.
        library = Path(closing.enter_context(tempfile.TemporaryDirectory())) if normals else None
        roots = sorted({path.resolve().parent for path in [*files, *good]})
        console.print("[dim]Starting policy, zoom, retrieval and agent…[/dim]")
        async with embedded(data_dir, roots, model, library, category) as stack:
            if good:
                await add_exemplars(stack, category, good)
            progress = closing.enter_context(make_progress("Inspecting", len(files)))
            table = Table("image", "decision", "score", "type", "tools", "turns")

            def show(outcome: Outcome) -> None:
                progress.advance(progress.task_ids[0])
                printed = as_row(outcome, write_trace(out or data_dir, outcome))
                if as_json:
                    print(json.dumps(printed), flush=True)
                else:
                    table.add_row(*_cells(printed))

            outcomes = await inspect_all(stack.agent, stack.images, [Item(str(f), f, category) for f in files], show)
            progress.stop()
            if not as_json:
                Console().print(table)
            _say_unknown(outcomes, category)
            if out:
                console.print(f"Evidence: {write_report(out, outcomes, stack.images)}")
    return outcomes


def _normal_pictures(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise BadInput(f"--normals {folder}: there is no such folder")
    files = find_images([folder])
    if not files:
        raise BadInput(f"--normals {folder}: there are no pictures in it that can be read")
    return files


def make_progress(words: str, total: int) -> Progress:
    """A bar on stderr with one task."""
    progress = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    )
    progress.add_task(words, total=total)
    return progress


async def add_exemplars(stack: Stack, category: str, files: list[Path]) -> int:
    """How many were new. Raises BadInput for a file that is no usable picture."""
    images = [await asyncio.to_thread(stack.images.describe, file) for file in files]
    added = 0
    for start in range(0, len(images), 64):
        request = retrieval_pb2.AddExemplarsRequest(category=category, images=images[start : start + 64])
        added += (await stack.retrieval.AddExemplars(request)).added
    return added


def as_row(outcome: Outcome, trace: Path | None) -> dict[str, Any]:
    if outcome.inspection is None:
        return {"image": outcome.item.name, "error": outcome.error}
    return row(outcome.item.name, outcome.inspection, str(trace))


def _cells(printed: dict[str, Any]) -> list[str]:
    name = escape(readable(printed["image"]))
    if "error" in printed:
        return [name, "[red]error[/red]", "", escape(readable(printed["error"])), "", ""]
    decision = f"[{COLOURS[printed['decision']]}]{printed['decision']}[/]"
    score = "" if printed["score"] is None else f"{printed['score']:.3f}"
    return [name, decision, score, escape(printed["type"]), " ".join(printed["tools"]), str(printed["turns"])]


def _say_unknown(outcomes: list[Outcome], category: str) -> None:
    done = [outcome.inspection for outcome in outcomes if outcome.inspection]
    if done and not done[0].trajectory.category_known:
        print(
            f"The policy {done[0].policy_version} was not trained on the category {category!r}: "
            "take its verdicts as a first guess.",
            file=sys.stderr,
        )
