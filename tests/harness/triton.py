"""A real Triton (from the wheel nvidia-pytriton) on a free loopback port, with the policy's model repository."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.policy.triton_server import triton_command
from tests.harness.process import free_port, running, wait_for_port

START_DEADLINE_S = 60.0
# Triton unloads its models first; a stub that holds torch takes its time.
STOP_DEADLINE_S = 30.0


@contextmanager
def triton(python: Path = Path(sys.executable)) -> Iterator[str]:
    """host:port of its gRPC endpoint. `python`: of the environment that its models use."""
    port = free_port()
    with triton_command(port, python) as (command, environment), tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = running(command, log, environment)
        try:
            wait_for_port(port, process, log, START_DEADLINE_S)
            yield f"127.0.0.1:{port}"
            if process.poll() is not None:
                raise RuntimeError(f"Triton crashed during the tests:\n{log.read_text(errors='replace')[-3000:]}")
        finally:
            process.terminate()
            try:
                process.wait(STOP_DEADLINE_S)
            finally:
                process.kill()
