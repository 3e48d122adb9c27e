"""A real Milvus server (milvus-lite's, from the wheel) on a free loopback port, over a folder of its own."""

import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness.process import free_port, running, wait_for_port

START_DEADLINE_S = 60.0


@contextmanager
def milvus() -> Iterator[str]:
    """Its URI."""
    server = shutil.which("milvus-lite", path=str(Path(sys.executable).parent))
    if server is None:
        raise RuntimeError("milvus-lite is missing: run `make install`")
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="agentiad-milvus-") as folder:
        log = Path(folder) / "log.txt"
        # Its default host is 0.0.0.0: the whole network.
        options = ["--data-dir", f"{folder}/data", "--host", "127.0.0.1", "--port", str(port)]
        process = running([server, "server", *options], log)
        try:
            wait_for_port(port, process, log, START_DEADLINE_S)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()
            process.wait()
