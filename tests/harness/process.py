"""Starting a real server for the tests, and knowing when it is up."""

import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

POLL_S = 0.05


def free_port() -> int:
    """A loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def running(command: Sequence[str], log: Path, env: dict[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Its output goes to the end of `log`. The caller ends it."""
    with log.open("ab") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=env)


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", log: Path, deadline_s: float) -> None:
    """Until it accepts connections; RuntimeError with the end of its log if it ends or is too late."""
    deadline = time.monotonic() + deadline_s
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(POLL_S)  # nothing tells us when a foreign process begins to listen
        else:
            return
    process.kill()
    process.wait()
    raise RuntimeError(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
