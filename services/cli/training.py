"""`agentiad train rl`: the trainer, with the services that it needs as processes of this machine.

Order: Redis → policy, zoom, retrieval, reward → agents → trainer. The environment swaps addresses as for `agentiad up`.
On more machines each part is started by its orchestrator, and the trainer by `python -m services.trainer rl`.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from services.chassis import lifecycle, problems, telemetry, topics
from services.chassis.settings import load
from services.cli.plant import open_bus
from services.cli.processes import Child, StackError, ready, redis_server, service, until_stopped
from services.trainer.__main__ import rl_alone
from services.trainer.settings import RlSettings, TrainerSettings

console = Console(stderr=True)


def run_rl(settings: RlSettings, replay: str) -> None:
    """Returns when training has ended; SystemExit 1 if a part failed."""
    from services.trainer.run import check

    check(settings, replay)
    if replay:
        os.environ.update(_image_places(os.environ))
        rl_alone(settings, replay)
        return
    telemetry.configure("train", "WARNING")
    failed = False

    async def main(stop: asyncio.Event) -> None:
        nonlocal failed
        try:
            await _train(settings, stop)
        except Exception as error:
            # What a person can mend ends in a sentence, and not in the log as a crash.
            sentence = str(error) if isinstance(error, StackError) else problems.sentence(error)
            if sentence is None:
                raise
            console.print(f"[red]{escape(sentence)}[/red]")
            failed = True

    lifecycle.run(main)
    if failed:
        raise SystemExit(1)


async def _train(settings: RlSettings, stop: asyncio.Event) -> None:
    from services.trainer.rl import train

    console.print("[dim]Starting policy, zoom, retrieval and reward, then an agent…[/dim]")
    async with rollout_services(settings, stop) as (environment, children):
        if stop.is_set():
            return
        addresses = {name: environment[f"{name.upper()}_ADDRESS"] for name in ("policy", "retrieval")}
        services = load(TrainerSettings).model_copy(
            update={f"{name}_address": address for name, address in addresses.items()}
            | {"image_roots": (environment["IMAGE_ROOTS"],), "image_store": environment["IMAGE_STORE"]}
        )
        training = asyncio.create_task(train(settings, services, console))
        watching = asyncio.create_task(until_stopped(children, stop))
        done, _ = await asyncio.wait([training, watching], return_when=asyncio.FIRST_COMPLETED)
        for task in (training, watching):
            task.cancel()
        if watching in done:
            watching.result()
        if training in done:
            _conclude(settings, training.result(), environment)


def _conclude(settings: RlSettings, newest: Path, environment: Mapping[str, str]) -> None:
    """Says what there is now, and what one may do with it."""
    from services.cli import rollouts

    page = settings.out / "page"
    rollouts.write_page(settings.out, page, [environment["IMAGE_ROOTS"]])
    console.print(
        f"[bold green]Done.[/bold green] Newest version: {newest}\n"
        f"Curves: {settings.out / 'curves.png'}; some rollouts: {page / 'index.html'}\n"
        f"To inspect with it, if it is not worse than what runs now: "
        f"[bold]CHECKPOINT_ROOTS={settings.out.resolve()} agentiad policy promote {newest.name}[/bold]"
    )


@asynccontextmanager
async def rollout_services(
    settings: RlSettings, stop: asyncio.Event
) -> AsyncIterator[tuple[dict[str, str], list[Child]]]:
    """What rollouts take, with a policy that follows the run's candidates: the environment that its processes have been
    given, and the processes.
    """
    from services.trainer.run import SERVICES

    environment, children = dict(os.environ), list[Child]()
    environment |= _image_places(environment)
    data_dir = Path(environment["DATA_DIR"])
    own = settings.out.resolve() / SERVICES
    own.mkdir(parents=True, exist_ok=True)
    environment |= {
        # A file's library belongs to one process, and the plant's may run already.
        "MILVUS_URI": environment.get("MILVUS_URI") or str(own / "exemplars.db"),
        "CHECKPOINT": str(settings.base.resolve()),
        "CHECKPOINT_ROOTS": str(settings.out.resolve()),
        "POLICY_NAME": topics.candidate_of(settings.policy),
        "WORK": "rollout",
    }
    # Beside a trainer that uses the other cores; more threads than cores stall each other.
    environment.setdefault("TORCH_THREADS", str(max(1, (os.cpu_count() or 2) // 2)))
    environment.setdefault("OMP_NUM_THREADS", "1")
    bus = open_bus(data_dir)
    await bus.ensure_topics(topics.TOPICS)
    await bus.close()
    async with AsyncExitStack() as running:
        # A short path: unix sockets allow about 100 characters.
        folder = running.enter_context(tempfile.TemporaryDirectory(prefix="agentiad-"))
        names = ("policy", "zoom", "retrieval", "reward")
        addresses = {name: f"unix://{folder}/{name}.sock" for name in names}
        environment |= {f"{name.upper()}_ADDRESS": address for name, address in addresses.items()}
        if not environment.get("REDIS_URL"):
            redis, environment["REDIS_URL"] = await running.enter_async_context(redis_server(own))
            children.append(redis)
        started = [await running.enter_async_context(service(name, addresses[name], environment)) for name in names]
        children += started
        await asyncio.gather(*(ready(child, addresses[child.name], stop) for child in started))
        address = f"unix://{folder}/agent.sock"
        agent = await running.enter_async_context(service("agent", address, environment))
        await ready(agent, address, stop)
        children.append(agent)
        yield environment, children


def _image_places(environment: Mapping[str, str]) -> dict[str, str]:
    """Where a run's pictures are, unless the environment says otherwise: in the data folder."""
    data_dir = Path(environment.get("DATA_DIR") or "out").resolve()
    images = str(data_dir / "images")
    return {
        "DATA_DIR": str(data_dir),
        "IMAGE_ROOTS": environment.get("IMAGE_ROOTS") or images,
        "IMAGE_STORE": environment.get("IMAGE_STORE") or images,
    }
