"""`python -m services.data`, which is also `agentiad data`. Light to start: each command imports what it needs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from services.data.build import Summary

app = typer.Typer(no_args_is_help=True, help="Make sets of demonstrations to learn from.")


# With a callback a single command keeps its name.
@app.callback()
def data() -> None:
    pass


@app.command()
def build(
    out: Annotated[Path, typer.Option(help="Where the set goes. Run again after an interruption: it goes on.")],
    samples: Annotated[int, typer.Option(min=1, help="How many episodes.")],
    data: Annotated[
        str,
        typer.Option(help="'procedural', or a data set: a manifest.jsonl, an MVTec layout, or a folder a category."),
    ] = "procedural",
    seed: Annotated[int, typer.Option(help="Another seed, other episodes.")] = 0,
    view: Annotated[
        Literal["composite", "side-by-side"],
        typer.Option(help="How the checkpoint that will learn sees comparisons; pocket: composite."),
    ] = "composite",
    thoughts_url: Annotated[
        str | None,
        typer.Option(
            help="An OpenAI-compatible endpoint (…/v1) that writes the thoughts, given pictures and truth; its key "
            "comes from THOUGHTS_API_KEY. Default: thoughts composed from templates."
        ),
    ] = None,
    thoughts_model: Annotated[str | None, typer.Option(help="The endpoint's name for the model.")] = None,
) -> None:
    """Build demonstrations (look, zoom, compare, answer) from boxes, for `train sft --data DIR`.

    Boxes and verdicts come from the data, whoever writes the thoughts.
    """
    if (thoughts_url is None) != (thoughts_model is None):
        raise typer.BadParameter("--thoughts-url and --thoughts-model go together", param_hint="--thoughts-url")
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from services.data.build import BuildSettings
    from services.data.build import build as run
    from services.data.endpoint import EndpointSettings

    settings = BuildSettings(out=out, data=data, samples=samples, seed=seed, view=view, thoughts_model=thoughts_model)
    endpoint = None
    if thoughts_url is not None and thoughts_model is not None:
        endpoint = EndpointSettings(thoughts_url, thoughts_model, os.environ.get("THOUGHTS_API_KEY", ""))
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("episodes", total=samples)
        summary = run(settings, endpoint, lambda count: progress.advance(bar, count))
    _say(console, out, summary)


def _say(console: Console, out: Path, summary: Summary) -> None:
    console.print(
        f"{out}: {summary.episodes} episodes, {summary.anomalous / summary.episodes:.0%} anomalous; "
        f"perceptive {summary.perceptive / summary.episodes:.0%}, "
        f"comparative {summary.comparative / summary.episodes:.0%}"
    )
    if summary.written or summary.kept:
        rejected = sum(summary.rejected.values())
        console.print(
            f"thoughts: {summary.written} written, {summary.kept} kept from the templates; {rejected} answers rejected"
        )
        for reason, count in summary.rejected.most_common():
            console.print(f"  {count} x {reason}")
    if summary.probe is not None:
        low, high = 0.5 - summary.probe.margin, 0.5 + summary.probe.margin
        console.print(
            f"label told from the first thoughts alone: balanced accuracy {summary.probe.balanced_accuracy:.2f} "
            f"(chance: {max(low, 0.0):.2f} to {min(high, 1.0):.2f})"
        )
        if summary.probe.leaks:
            console.print("[red]The thoughts give the label away: a policy would learn it from words.[/red]")


if __name__ == "__main__":
    from services.chassis import problems

    problems.run(app)
