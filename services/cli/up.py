"""`agentiad up`: the whole stack as processes of this machine, from start to stop.

Order: Redis → policy, zoom, retrieval → agents; each is waited for by its health check. A process that ends by itself
ends the stack: restarting is the business of an orchestrator (k8s/), and a half stack helps nobody. On SIGINT or
SIGTERM agents drain first, then the services that they call.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from services.agent.settings import AgentSettings
from services.chassis import lifecycle, telemetry, topics
from services.chassis.errors import BadInput
from services.chassis.settings import load
from services.cli.plant import bus_name, open_bus
from services.cli.processes import Child, StackError, ready, redis_server, service, until_stopped

console = Console(stderr=True)


def run(agents: int, model: Path | None, engine: str | None, data_dir: Path) -> int:
    """Returns when the stack has stopped; exit status 1 if a part failed. BadInput: `model` is no checkpoint."""
    if model is not None and not (model / "config.json").is_file():
        raise BadInput(f"--model {model} holds no checkpoint (config.json is missing)")
    telemetry.configure("up", "WARNING")
    status = 0

    async def main(stop: asyncio.Event) -> None:
        nonlocal status
        try:
            await _run(agents, model, engine, data_dir.resolve(), stop)
        except StackError as error:
            console.print(f"[red]{error}[/red]")
            status = 1

    lifecycle.run(main)
    return status


async def _run(agents: int, model: Path | None, engine: str | None, data_dir: Path, stop: asyncio.Event) -> None:
    settings = load(AgentSettings)
    async with AsyncExitStack() as running:
        children: list[Child] = []
        environment = await _environment(running, model, engine, data_dir, children)
        console.print("[dim]Starting policy, zoom and retrieval, then the agents…[/dim]")
        bus = open_bus(data_dir)
        await bus.ensure_topics(topics.TOPICS)
        await bus.close()
        addresses = {
            "policy": settings.policy_address, "zoom": settings.zoom_address, "retrieval": settings.retrieval_address,
        }  # fmt: skip
        services = [
            await running.enter_async_context(service(name, address, environment))
            for name, address in addresses.items()
        ]
        children += services
        await asyncio.gather(*(ready(child, addresses[child.name], stop) for child in services))
        for number in range(agents):
            address = _numbered(settings.bind, number)
            child = await running.enter_async_context(service("agent", address, environment))
            await ready(child, address, stop)
            children.append(child)
        if not stop.is_set():
            console.print(f"[bold green]Ready.[/bold green] Bus: {bus_name(data_dir)}. "
                          f"Pictures may lie under {environment['IMAGE_ROOTS']}.\n"
                          "Now, in other terminals: [bold]agentiad exemplars add NORMALS -c PRODUCT[/bold], "
                          "[bold]agentiad watch[/bold] and [bold]agentiad publish DIR --line L -c PRODUCT[/bold] "
                          f"(in other folders with --data-dir {data_dir}). Ctrl-C stops.")  # fmt: skip
        await until_stopped(children, stop)
        console.print("Stopping: agents finish what they have begun…")


async def _environment(
    running: AsyncExitStack, model: Path | None, engine: str | None, data_dir: Path, children: list[Child]
) -> dict[str, str]:
    """What every process is given: the caller's environment, with what a stack on one machine needs beside it. A Redis
    that is started for it joins `children`.
    """
    environment = dict(os.environ)
    data_dir.mkdir(parents=True, exist_ok=True)
    environment["DATA_DIR"] = str(data_dir)
    environment.setdefault("IMAGE_ROOTS", str(Path.cwd()))
    environment.setdefault("IMAGE_STORE", str(data_dir / "images"))
    if model is not None:
        environment["CHECKPOINT"] = str(model.resolve())
    if engine is not None:
        environment["ENGINE"] = engine
    if not environment.get("REDIS_URL"):
        redis, environment["REDIS_URL"] = await running.enter_async_context(redis_server(data_dir))
        children.append(redis)
    return environment


def _numbered(address: str, number: int) -> str:
    """The address of agent `number`: the next ports, or sockets, after the first one's."""
    if address.startswith("unix:"):
        return f"{address}{number or ''}"
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}"
