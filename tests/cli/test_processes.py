"""What becomes of a stack's processes."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
async def test_a_parent_that_is_killed_leaves_nothing_behind() -> None:
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", PARENT, stdout=asyncio.subprocess.PIPE)
    assert parent.stdout is not None
    async with asyncio.timeout(60):
        pid = int(await parent.stdout.readline())
    ended, handle = asyncio.Event(), os.pidfd_open(pid)
    asyncio.get_running_loop().add_reader(handle, ended.set)
    try:
        assert not ended.is_set()
        os.kill(parent.pid, signal.SIGKILL)
        async with asyncio.timeout(30):
            await ended.wait()
    finally:
        asyncio.get_running_loop().remove_reader(handle)
        os.close(handle)
        await parent.wait()
