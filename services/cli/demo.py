"""`agentiad demo`: the whole loop on parts whose truth is known, with the tools and without."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis import telemetry
from services.cli.inspect import add_exemplars, console, make_progress
from services.cli.inspecting import Item, Outcome, inspect_all
from services.cli.report import write_report
from services.cli.rows import COLOURS, row
from services.cli.stack import embedded
from services.data.procedural import CATEGORIES, write_set
from services.data.readers import Sample, read_manifest
from services.evaluation.metrics import balanced_accuracy

# Not even one turn: the policy's first look, and the verdict.
NO_TOOLS = pb.Limits(max_turns=0, max_tool_calls=0, max_new_tokens=96)
# More rows than this are shown by category only.
MAX_ROWS = 80


@dataclass(frozen=True)
class Scores:
    """Balanced accuracy of the same parts, inspected with the tools and by the first look alone."""

    with_tools: float
    without_tools: float


def run(parts: int, seed: int, model: Path | None, out: Path) -> None:
    telemetry.configure("demo", "WARNING")
    asyncio.run(_run(parts, seed, model, out))


async def _run(parts: int, seed: int, model: Path | None, out: Path) -> None:
    if out.exists():
        shutil.rmtree(out)
    console.print(f"Making {parts} parts of each of {len(CATEGORIES)} categories, none of them seen in training…")
    manifest = await asyncio.to_thread(write_set, out / "parts", per_category=parts, seed=seed)
    samples = list(read_manifest(manifest))
    items = [item_of(sample) for sample in samples if sample.split != "train"]
    async with embedded(out, [manifest.parent.resolve()], model) as stack:
        for category in CATEGORIES:
            normals = [sample.image for sample in samples if sample.split == "train" and sample.category == category]
            added = await add_exemplars(stack, category, normals)
            console.print(f"[dim]Exemplar library: {added} normal parts of {category}[/dim]")
        with make_progress("Inspecting with the tools", len(items)) as progress:
            outcomes = await inspect_all(stack.agent, stack.images, items, lambda _: progress.advance(task))
            task = progress.add_task("… and without", total=len(items))
            untooled = await inspect_all(stack.agent, stack.images, items, lambda _: progress.advance(task), NO_TOOLS)
        page = await asyncio.to_thread(write_report, out, outcomes, stack.images)
    if len(outcomes) <= MAX_ROWS:
        console.print(_part_table(outcomes))
    console.print(_category_table(outcomes, untooled))
    console.print(f"Look at the evidence: [bold]{page.resolve()}[/bold]")


def item_of(sample: Sample) -> Item:
    truth = pb.GroundTruth(anomaly_present=sample.anomalous)
    for defect in sample.defects:
        x_min, y_min, x_max, y_max = defect.box
        truth.defects.add(type=defect.type, box=pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))
    name = "/".join(sample.image.parts[-4:])
    return Item(name, sample.image, sample.category, truth)


def _part_table(outcomes: Sequence[Outcome]) -> Table:
    table = Table("part", "verdict", "truth", "score", "tools used", title="Every part")
    for outcome in outcomes:
        assert outcome.inspection is not None, outcome.error
        assert outcome.item.truth is not None
        shown = row(outcome.item.name, outcome.inspection, None)
        verdict = f"[{COLOURS[shown['decision']]}]{shown['decision']}[/] {shown['type']}"
        truth = ", ".join(defect.type for defect in outcome.item.truth.defects) or "normal"
        score = "" if shown["score"] is None else f"{shown['score']:.3f}"
        table.add_row(outcome.item.category, verdict, truth, score, " → ".join(shown["tools"]) or "none")
    return table


def _category_table(outcomes: Sequence[Outcome], untooled: Sequence[Outcome]) -> Table:
    table = Table("category", "parts", "with tools", "without", "zooms", "comparisons", title="Balanced accuracy")
    for category in [*CATEGORIES, None]:
        mine = [o for o in outcomes if category in (None, o.item.category)]
        scores = Scores(_accuracy(mine), _accuracy([o for o in untooled if category in (None, o.item.category)]))
        tools = [row("", o.inspection, None)["tools"] for o in mine if o.inspection]
        zooms = sum("crop_image_normalized" in used for used in tools) / len(tools)
        comparisons = sum("query_image" in used for used in tools) / len(tools)
        table.add_row(
            category or "[bold]all[/bold]", str(len(mine)), f"[bold]{scores.with_tools:.3f}[/bold]",
            f"{scores.without_tools:.3f}", f"{zooms:.0%}", f"{comparisons:.0%}", end_section=category == CATEGORIES[-1],
        )  # fmt: skip
    return table


def _accuracy(outcomes: Sequence[Outcome]) -> float:
    truth = [outcome.item.truth is not None and outcome.item.truth.anomaly_present for outcome in outcomes]
    predicted = [outcome.inspection is not None and outcome.inspection.verdict.anomaly_present for outcome in outcomes]
    return balanced_accuracy(truth, predicted)
