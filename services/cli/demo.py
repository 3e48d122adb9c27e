"""`agentiad demo`: the whole loop on parts whose truth is known, with the tools and without."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.agent.episode import tools_used
from services.chassis import telemetry
from services.chassis.errors import BadInput
from services.cli.inspect import add_exemplars, console, make_progress
from services.cli.inspecting import Item, Outcome, inspect_all
from services.cli.page import Result, Summary
from services.cli.report import write_report, write_trace
from services.cli.rows import COLOURS, row
from services.cli.stack import embedded
from services.data.procedural import CATEGORIES, TRAINING_VARIANTS, write_set
from services.data.readers import Sample, read
from services.evaluation.metrics import balanced_accuracy

# Not even one turn: the policy's first look, and the verdict.
NO_TOOLS = pb.Limits(max_turns=0, max_tool_calls=0, max_new_tokens=96)
NOTE = "Parts that training never saw. Without the tools: the verdict after the first look, of the same policy."
# Written first, so that a demo which was interrupted can be run again.
MARK = ".agentiad-demo"
# More rows than this are shown by category only.
MAX_ROWS = 80


def run(parts: int, seed: int, model: Path | None, out: Path) -> None:
    telemetry.configure("demo", "WARNING")
    asyncio.run(_run(parts, seed, model, out))


async def _run(parts: int, seed: int, model: Path | None, out: Path) -> None:
    make_folder(out)
    console.print(f"Making {parts} parts of each of {len(CATEGORIES)} categories, none of them seen in training…")
    manifest = await asyncio.to_thread(
        write_set, out / "parts", per_category=parts, first_seed=TRAINING_VARIANTS + seed * 10_000
    )
    samples = read(manifest)
    items = [item_of(sample) for sample in samples if sample.split != "train"]
    async with embedded(out, [manifest.parent.resolve()], model, library=out) as stack:
        for category in CATEGORIES:
            normals = [sample.image for sample in samples if sample.split == "train" and sample.category == category]
            added = await add_exemplars(stack, category, normals)
            console.print(f"[dim]Exemplar library: {added} normal parts of {category}[/dim]")
        with make_progress("Inspecting with the tools", len(items)) as progress:
            first, second = progress.task_ids[0], progress.add_task("… and by the first look alone", total=len(items))
            outcomes = await inspect_all(stack.agent, stack.images, items, lambda _: progress.advance(first))
            untooled = await inspect_all(stack.agent, stack.images, items, lambda _: progress.advance(second), NO_TOOLS)
        for outcome in outcomes:
            write_trace(out, outcome)
        results = [_result(category, outcomes, untooled) for category in CATEGORIES]
        total = _result(None, outcomes, untooled)
        summary = Summary("Demo: procedural parts", NOTE, tuple(results), total)
        page = await asyncio.to_thread(write_report, out, outcomes, stack.images, summary)
    if len(outcomes) <= MAX_ROWS:
        console.print(_part_table(outcomes))
    console.print(_category_table([*results, total], outcomes))
    console.print(f"Look at the evidence: [bold]{page.resolve()}[/bold]")


def make_folder(out: Path) -> None:
    """An empty folder, marked as a demo's; what an earlier demo left there goes. BadInput: it holds something else."""
    if out.is_dir() and any(out.iterdir()):
        if not (out / MARK).is_file():
            raise BadInput(f"{out} holds files that no demo made: give a new or an empty folder (--out)")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text("Made by `agentiad demo`, which removes this folder when it is run again.\n")


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


def _result(category: str | None, outcomes: Sequence[Outcome], untooled: Sequence[Outcome]) -> Result:
    mine = _of(category, outcomes)
    return Result(category or "all", len(mine), _accuracy(mine), _accuracy(_of(category, untooled)))


def _category_table(results: Sequence[Result], outcomes: Sequence[Outcome]) -> Table:
    table = Table("category", "parts", "with tools", "without", "zooms", "comparisons", title="Balanced accuracy")
    for result in results:
        mine = _of(None if result.name == "all" else result.name, outcomes)
        tools = [tools_used(outcome.inspection.trajectory) for outcome in mine if outcome.inspection]
        table.add_row(
            result.name, str(result.parts), f"[bold]{result.with_tools:.3f}[/bold]", f"{result.without_tools:.3f}",
            f"{_share(protocol.CROP, tools):.0%}", f"{_share(protocol.QUERY, tools):.0%}",
            end_section=result.name == CATEGORIES[-1],
        )  # fmt: skip
    return table


def _of(category: str | None, outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if category in (None, outcome.item.category)]


def _share(tool: str, used: Sequence[Sequence[str]]) -> float:
    return sum(tool in tools for tools in used) / max(1, len(used))


def _accuracy(outcomes: Sequence[Outcome]) -> float:
    truth = [outcome.item.truth is not None and outcome.item.truth.anomaly_present for outcome in outcomes]
    predicted = [outcome.inspection is not None and outcome.inspection.verdict.anomaly_present for outcome in outcomes]
    return balanced_accuracy(truth, predicted)
