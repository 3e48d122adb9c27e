"""A real Triton for one machine, from the nvidia-pytriton wheel (Triton 2.51): for `agentiad up` and the tests.

In production Triton is NVIDIA's own container. What follows was found by trial (FACTS.md §4): the Python stub needs the
libpython of the interpreter that runs it, and takes its packages from the virtual environment that is first on PATH.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import grpc
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc import service_pb2_grpc

_REPOSITORY = Path(__file__).parent / "model_repository"
_ROOT = Path(__file__).parents[2]
_START_S = 60.0
_STOP_S = 15.0


class TritonUnavailableError(Exception):
    """Triton cannot be started here; the text says what to install or what Triton said."""


@asynccontextmanager
async def run_triton(log: Path | None = None, environment: dict[str, str] | None = None) -> AsyncIterator[str]:
    """Yields the address (host:port) of a Triton that accepts model loads; stops it at the end.

    `log`: where its output goes (default: nowhere). Raises TritonUnavailableError.
    """
    wheel = _wheel()
    with tempfile.TemporaryDirectory(prefix="agentiad-triton-") as folder:
        backends = _backends(wheel, Path(folder))
        port = _free_port()
        with (log or Path(os.devnull)).open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                str(wheel / "tritonserver" / "bin" / "tritonserver"),
                f"--model-repository={_REPOSITORY}",
                "--model-control-mode=explicit",
                f"--backend-directory={backends}",
                "--disable-auto-complete-config",
                "--grpc-address=127.0.0.1",
                f"--grpc-port={port}",
                "--allow-http=false",
                "--allow-metrics=false",
                "--exit-timeout-secs=10",
                env={**os.environ, **_environment(wheel), **(environment or {})},
                stdout=output,
                stderr=output,
            )
            try:
                await _until_live(process, f"127.0.0.1:{port}")
                yield f"127.0.0.1:{port}"
            finally:
                await _stop(process)


def _wheel() -> Path:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonUnavailableError("the Triton server is missing: uv pip install nvidia-pytriton==0.7.0")
    return Path(spec.origin).parent


def _backends(wheel: Path, folder: Path) -> Path:
    """A backend directory: the wheel's Python backend with the stub of this Python."""
    python = folder / "backends" / "python"
    shutil.copytree(wheel / "tritonserver" / "backends" / "python", python)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonUnavailableError(f"nvidia-pytriton has no stub for Python {version}; use 3.11")
    shutil.copy2(stub, python)
    return python.parent


def _environment(wheel: Path) -> dict[str, str]:
    # The interpreter's own folder leads: the stub would otherwise load the system's libpython.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(wheel.parent / "nvidia_pytriton.libs")]
    return {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{_ROOT / 'protos' / 'python'}:{_ROOT}",
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def _until_live(process: asyncio.subprocess.Process, address: str) -> None:
    """Live, not ready: one failed model load makes the whole server unready."""
    async with grpc.aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        live = asyncio.ensure_future(stub.ServerLive(triton.ServerLiveRequest(), wait_for_ready=True, timeout=_START_S))
        died = asyncio.ensure_future(process.wait())
        await asyncio.wait([live, died], return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            live.cancel()
            raise TritonUnavailableError(f"Triton ended at its start with status {process.returncode}")
        died.cancel()
        try:
            await live
        except grpc.aio.AioRpcError as error:
            raise TritonUnavailableError(f"Triton was not live after {_START_S:.0f} s") from error


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), _STOP_S)
    except TimeoutError:
        process.kill()
        await process.wait()
