"""How to start a real Triton on one machine, from the nvidia-pytriton wheel (Triton 2.51): for tests and trials.

In production Triton is NVIDIA's own container. What follows was found by trial: the Python stub needs the
libpython of the interpreter that runs it, and takes its packages from the virtual environment that is first on PATH.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

_REPOSITORY = Path(__file__).parent / "model_repository"


class TritonMissingError(Exception):
    """There is no Triton to start here; the text says what to install."""


@contextmanager
def triton_command(port: int, python: Path = Path(sys.executable)) -> Iterator[tuple[list[str], dict[str, str]]]:
    """(command, environment) of a Triton that serves gRPC on 127.0.0.1:`port` and loads models when it is told to.

    `python`: of the virtual environment whose packages the models use; of the same Python as this process.
    What the command needs on disk is there until the block ends. Probe the models' readiness, not the server's: one
    failed load makes the whole server unready. Raises TritonMissingError.
    """
    wheel = _wheel()
    with tempfile.TemporaryDirectory(prefix="agentiad-triton-") as folder:
        command = [
            str(wheel / "tritonserver" / "bin" / "tritonserver"),
            f"--model-repository={_REPOSITORY}",
            "--model-control-mode=explicit",
            f"--backend-directory={_backends(wheel, Path(folder))}",
            "--disable-auto-complete-config",
            "--grpc-address=127.0.0.1",
            f"--grpc-port={port}",
            "--allow-http=false",
            "--allow-metrics=false",
            "--exit-timeout-secs=10",
        ]
        yield command, {**os.environ, **_environment(wheel, python)}


def _wheel() -> Path:
    spec = find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise TritonMissingError("the Triton server is missing: uv pip install nvidia-pytriton==0.7.0")
    return Path(spec.origin).parent


def _backends(wheel: Path, folder: Path) -> Path:
    """A backend directory: the wheel's Python backend with the stub of this Python."""
    python = folder / "backends" / "python"
    shutil.copytree(wheel / "tritonserver" / "backends" / "python", python)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.exists():
        raise TritonMissingError(f"nvidia-pytriton has no stub for Python {version}; use 3.11")
    shutil.copy2(stub, python)
    return python.parent


def _environment(wheel: Path, python: Path) -> dict[str, str]:
    # The interpreter's own folder leads: the stub would otherwise load the system's libpython.
    libraries = [sysconfig.get_config_var("LIBDIR"), str(wheel.parent / "nvidia_pytriton.libs")]
    return {
        "LD_LIBRARY_PATH": ":".join(libraries),
        "PATH": f"{python.parent}:{os.environ.get('PATH', '')}",
    }
