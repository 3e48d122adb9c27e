"""`python -m services.trainer`, which is also `agentiad train`. Light to start: each command imports what it needs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    # It exists for the type checker only: pydantic takes a while.
    from services.trainer.settings import RlSettings

Out = Annotated[Path, typer.Option(help="Where the checkpoint goes. Run again after an interruption: it resumes.")]
Seed = Annotated[int, typer.Option(help="Another seed, another run.")]


_OPTIONS = frozenset({"out", "base", "data", "reward", "seed"})


def make_app(run_rl: Callable[[RlSettings, str], None]) -> typer.Typer:
    """`run_rl`: trains by RL settings, or from the past of the run whose id is given."""
    app = typer.Typer(no_args_is_help=True, help="Make policies.")

    @app.command()
    def sft(
        out: Out,
        data: Annotated[
            str,
            typer.Option(
                help="'procedural', or a data set: a manifest.jsonl, an MVTec layout, a folder a category, or what "
                "`agentiad data build` wrote."
            ),
        ] = "procedural",
        preset: Annotated[
            str,
            typer.Option(
                help="pocket: a small policy from nothing, on a laptop's CPU. pocket-undertrained: the same, stopped "
                "early, for RL to begin from. pretrained: the paper's settings for a large --base."
            ),
        ] = "pocket",
        base: Annotated[Path | None, typer.Option(help="A checkpoint folder to go on from.")] = None,
        seed: Seed = 0,
    ) -> None:
        """Supervised fine-tuning: teach a policy to look, zoom, compare and answer, from boxes."""
        from rich.console import Console

        from services.trainer.settings import PRESETS
        from services.trainer.settings import preset as settings_of

        _check_preset(preset, PRESETS)
        from services.trainer.sft import train as run

        console = Console()
        console.print(f"Checkpoint: {run(settings_of(preset, data=data, out=out, base=base, seed=seed), console)}")

    @app.command()
    def rl(
        out: Out,
        base: Annotated[Path, typer.Option(help="The checkpoint folder to begin with.")],
        preset: Annotated[
            str,
            typer.Option(
                help="pocket: on a laptop. qwen2.5-vl-3b, qwen3-vl-4b: the paper's settings, on two GPUs of 80 GB or "
                "more, by `torchrun --nproc-per-node 2 -m services.trainer rl`."
            ),
        ] = "pocket",
        data: Annotated[str, typer.Option(help="'procedural', or a data set whose samples have boxes.")] = "procedural",
        reward: Annotated[
            str | None, typer.Option(help="gated, paper or paper-as-run, less components: gated-type-format.")
        ] = None,
        seed: Seed = 0,
        replay: Annotated[
            str,
            typer.Option(
                help="Id of an earlier run (it is in its OUT/work/run): train from its rollouts, without any agent."
            ),
        ] = "",
        changes: Annotated[
            list[str] | None,
            typer.Option(
                "--set",
                metavar="NAME=VALUE",
                help="Any other of RlSettings in services/trainer/settings.py; repeatable.",
            ),
        ] = None,
    ) -> None:
        """Reinforcement learning (GRPO): sample rollouts, score them, learn, publish versions as they are made."""
        from services.trainer.settings import RL_PRESETS, RlSettings, rl_preset

        _check_preset(preset, RL_PRESETS)
        chosen: dict[str, object] = dict(_pair(change, RlSettings.model_fields) for change in changes or [])
        if reward is not None:
            chosen["reward"] = reward
        run_rl(rl_preset(preset, out=out, base=base, data=data, seed=seed, **chosen), replay)

    return app


def rl_alone(settings: RlSettings, replay: str) -> None:
    """The trainer by itself: the services run elsewhere, where the environment says."""
    import asyncio

    from rich.console import Console

    from services.chassis import telemetry
    from services.chassis.settings import load
    from services.trainer.rl import train
    from services.trainer.settings import TrainerSettings

    telemetry.configure("trainer", "WARNING")
    console = Console()
    console.print(f"Checkpoint: {asyncio.run(train(settings, load(TrainerSettings), console, replay))}")


def _check_preset(name: str, presets: dict[str, dict[str, object]]) -> None:
    if name not in presets:
        raise typer.BadParameter(f"{name!r} is none of {', '.join(presets)}", param_hint="--preset")


def _pair(change: str, known: Collection[str]) -> tuple[str, object]:
    name, separator, value = change.partition("=")
    if not separator:
        raise typer.BadParameter(f"{change!r} is not NAME=VALUE", param_hint="--set")
    if name in _OPTIONS:
        raise typer.BadParameter(f"{name} has an option of its own, --{name}", param_hint="--set")
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise typer.BadParameter(
            f"there is no setting {name!r}" + (f"; {near[0]}?" if near else ""), param_hint="--set"
        )
    return name, value


if __name__ == "__main__":
    from services.chassis import problems

    problems.run(make_app(rl_alone))
