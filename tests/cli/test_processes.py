"""What becomes of a stack's processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

PARENT = """
import asyncio, os
from services.cli.processes import process

async def main():
    async with process("sleeper", ["sleep", "600"], dict(os.environ)) as child:
        print(child.process.pid, flush=True)
        await child.process.wait()

asyncio.run(main())
"""


def is_running(pid: int) -> bool:
    """A zombie has ended: it only waits for whoever adopted it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
async def test_a_parent_that_is_killed_leaves_nothing_behind() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(60):
        pid = int(await parent.stdout.readline())
    assert is_running(pid)
    os.kill(parent.pid, signal.SIGKILL)
    await parent.wait()
    async with asyncio.timeout(30):
        while is_running(pid):  # nothing tells us when a foreign process has ended
            await asyncio.sleep(0.05)
