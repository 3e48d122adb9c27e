"""`agentiad`: everything a person does with the system. Light to start: each command imports what it needs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.chassis import problems
from services.data.__main__ import app as data_app
from services.trainer.__main__ import make_app as make_train_app

if TYPE_CHECKING:
    # It exists for the type checker only: pydantic takes a while.
    from services.trainer.settings import RlSettings

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="An inspection agent for factories: it looks, zooms, compares with normal parts and decides.\n\n"
    "Start with [bold]agentiad demo[/bold], then [bold]agentiad inspect my_pictures/ --normals good_ones/[/bold].",
)


def _run_rl(settings: RlSettings, replay: str) -> None:
    from services.cli import training

    training.run_rl(settings, replay)


exemplars_app = typer.Typer(no_args_is_help=True, help="The library of normal images that parts are compared with.")
policy_app = typer.Typer(no_args_is_help=True, help="Which published version of the policy inspections run on.")
app.add_typer(exemplars_app, name="exemplars")
app.add_typer(policy_app, name="policy")
app.add_typer(make_train_app(_run_rl), name="train")
app.add_typer(data_app, name="data")

Category = Annotated[str, typer.Option("--category", "-c", help="The product in the pictures, e.g. bare_pcb.")]
Model = Annotated[Path | None, typer.Option(help="A checkpoint folder of any transformers image-text-to-text model; "
                                                 "default: pocket, the one that ships with AgentIAD.")]  # fmt: skip
DataDir = Annotated[Path, typer.Option(envvar="DATA_DIR", help="Where library, embedded bus, drawn images and traces "
                                                               "are kept.")]  # fmt: skip
PolicyName = Annotated[str, typer.Option("--policy", help="The name that inspections follow (POLICY_NAME).")]


@app.command()
def demo(
    parts: Annotated[int, typer.Option(min=2, help="How many procedural parts a category.")] = 24,
    seed: Annotated[int, typer.Option(help="Another seed makes other parts, none of which training has seen.")] = 0,
    model: Model = None,
    out: Annotated[Path, typer.Option(help="Where the pictures and the page go.")] = Path("out/demo"),
) -> None:
    """Inspect procedural parts, normal and defective, with and without the tools, and show how it went.

    An earlier demo in the folder is removed; a folder that holds anything else is refused.
    """
    from services.cli import demo as command

    command.run(parts, seed, model, out)


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(help="Pictures, or folders of pictures.")],
    category: Category = "part",
    normals: Annotated[
        Path | None,
        typer.Option(
            help="A folder of normal pictures of the same product to compare with; default: the exemplar library."
        ),
    ] = None,
    model: Model = None,
    json_lines: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write an evidence picture an image, and a page.")] = None,
    data_dir: DataDir = Path("out"),
) -> None:
    """Inspect pictures. Exit status 1 if any could not be read (after all the others).

    Exemplars are kept by address: the pictures that were added must still lie where they did.
    """
    from services.cli import inspect as command

    raise typer.Exit(command.run(paths, category, normals, model, json_lines, out, data_dir))


@app.command()
def up(
    agents: Annotated[int, typer.Option(min=1, help="How many agents share the work.")] = 1,
    model: Model = None,
    engine: Annotated[
        Literal["transformers", "vllm"] | None,
        typer.Option(help="What runs the model; vllm wants `make install-vllm`. [default: ENGINE, else transformers]"),
    ] = None,
    data_dir: DataDir = Path("out"),
) -> None:
    """Run the whole stack as local processes until Ctrl-C, and say when it is ready.

    Embedded by default; uses Kafka when KAFKA_BOOTSTRAP_SERVERS is set, and likewise REDIS_URL, MILVUS_URI,
    and Triton with ENGINE_HOST=triton and TRITON_URL.
    Pictures are read from IMAGE_ROOTS (default: the current folder). `agentiad config` prints every setting.
    """
    from services.cli import up as command

    raise typer.Exit(command.run(agents, model, engine, data_dir))


@app.command()
def publish(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A picture, or a folder of pictures.")],
    line: Annotated[str, typer.Option("--line", "-l", help="The production line that they come from.")],
    category: Category = "part",
    budget: Annotated[
        float | None, typer.Option(help="Latency budget in seconds; after it the part goes to review.", min=0.001)
    ] = None,
    data_dir: DataDir = Path("out"),
) -> None:
    """Play the plant: publish an image event for each picture. They must lie under the stack's IMAGE_ROOTS."""
    from services.cli import plant as command

    raise typer.Exit(command.publish(directory, line, category, budget, data_dir))


@app.command()
def watch(
    from_beginning: Annotated[bool, typer.Option(help="Also those before now.")] = False,
    json_lines: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    count: Annotated[int | None, typer.Option(min=1, help="Stop after so many verdicts.")] = None,
    data_dir: DataDir = Path("out"),
) -> None:
    """Show verdicts as they come, each event's once, and images that could not be inspected, with the reason."""
    from services.cli import plant as command

    command.watch(from_beginning, json_lines, count, data_dir)


@app.command()
def config() -> None:
    """Print the settings of every service as they are resolved now, secrets masked."""
    from services.cli import config as command

    raise typer.Exit(command.run())


@exemplars_app.command("add")
def exemplars_add(
    paths: Annotated[list[Path], typer.Argument(help="Normal pictures, or folders of them.")],
    category: Category,
    data_dir: DataDir = Path("out"),
) -> None:
    """Add normal pictures to a category. Adding one twice changes nothing."""
    from services.cli import exemplars as command

    raise typer.Exit(command.add(paths, category, data_dir))


@exemplars_app.command("list")
def exemplars_list(
    category: Annotated[str, typer.Option("--category", "-c", help="Only this one.")] = "",
    data_dir: DataDir = Path("out"),
) -> None:
    """List the library."""
    from services.cli import exemplars as command

    command.show(category, data_dir)


@exemplars_app.command("remove")
def exemplars_remove(
    category: Category,
    sha256: Annotated[list[str] | None, typer.Argument(help="Digests as `list` shows them.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="The whole category.")] = False,
    data_dir: DataDir = Path("out"),
) -> None:
    """Remove pictures from a category."""
    from services.cli import exemplars as command

    raise typer.Exit(command.remove(category, sha256 or [], everything, data_dir))


@policy_app.command("list")
def policy_list(
    policy: PolicyName = "policy",
    json_lines: Annotated[bool, typer.Option("--json", help="Print a JSON object a line.")] = False,
    data_dir: DataDir = Path("out"),
) -> None:
    """List the versions in order of publication: which is live, which was, which are candidates; their evaluation."""
    from services.cli import policies as command

    command.show(policy, json_lines, data_dir)


@policy_app.command("promote")
def policy_promote(
    version: Annotated[str, typer.Argument(help="A candidate, as `list` shows it.")],
    policy: PolicyName = "policy",
    evaluation_set: Annotated[
        Literal["procedural"], typer.Option("--set", help="What both inspect: parts that no training saw.")
    ] = "procedural",
    margin: Annotated[
        float, typer.Option(min=0, max=1, help="What it may lose in balanced accuracy, with 97.5 % confidence.")
    ] = 0.02,
    data_dir: DataDir = Path("out"),
) -> None:
    """Let inspections run on a candidate, if it is not worse than the live version.

    Both inspect the same parts, in this process. Exit status 1 if it is not shown that the candidate is no worse.
    Checkpoints are read from where the policy services may read them (CHECKPOINT, CHECKPOINT_ROOTS).
    """
    from services.cli import policies as command

    raise typer.Exit(command.promote(version, policy, evaluation_set, margin, data_dir))


@policy_app.command("rollback")
def policy_rollback(
    version: Annotated[
        str | None, typer.Argument(help="One that was live before; default: the one before the live one.")
    ] = None,
    policy: PolicyName = "policy",
    data_dir: DataDir = Path("out"),
) -> None:
    """Let inspections run on a version that was live before. It has passed its test then."""
    from services.cli import policies as command

    command.rollback(version, policy, data_dir)


def main() -> None:
    # It logs the traceback of what it raises as well.
    logging.getLogger("milvus_lite.server_manager").setLevel(logging.CRITICAL)
    problems.run(app)


if __name__ == "__main__":
    main()
