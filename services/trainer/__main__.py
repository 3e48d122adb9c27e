"""`python -m services.trainer`, which is also `agentiad train`. Light to start: each command imports what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Make policies.")


# With a callback a single command keeps its name.
@app.callback()
def train() -> None:
    pass


@app.command()
def sft(
    out: Annotated[Path, typer.Option(help="Where the checkpoint goes. Run again after an interruption: it resumes.")],
    data: Annotated[
        str,
        typer.Option(help="'procedural', or a data set: a manifest.jsonl, an MVTec layout, or a folder a category."),
    ] = "procedural",
    preset: Annotated[
        str,
        typer.Option(
            help="pocket: a small policy from nothing, on a laptop's CPU. pocket-undertrained: the same, stopped "
            "early, for RL to begin from. pretrained: the paper's settings for a large --base."
        ),
    ] = "pocket",
    base: Annotated[Path | None, typer.Option(help="A checkpoint folder to go on from.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, another run.")] = 0,
) -> None:
    """Supervised fine-tuning: teach a policy to look, zoom, compare and answer, from boxes."""
    from rich.console import Console

    from services.trainer.settings import PRESETS
    from services.trainer.settings import preset as settings_of

    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}", param_hint="--preset")
    from services.trainer.sft import train as run

    console = Console()
    console.print(f"Checkpoint: {run(settings_of(preset, data=data, out=out, base=base, seed=seed), console)}")


if __name__ == "__main__":
    app()
