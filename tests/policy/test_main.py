"""The policy as a process: starts, answers, takes over published versions, obeys SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

from agentiad.v1 import policy_pb2 as pb
from agentiad.v1.events_pb2 import PolicyPublished
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from services.chassis import rpc
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.topics import POLICIES, TOPICS
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conversations import GREEDY, opening


async def test_the_process_from_start_to_stop(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        make_tiny_checkpoint(tmp_path / name, seed=seed, version=name)
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(TOPICS)
    environment = {
        **os.environ, "BIND": f"unix://{tmp_path}/policy.sock", "CHECKPOINT": str(tmp_path / "one"),
        "CHECKPOINT_ROOTS": str(tmp_path), "DATA_DIR": str(tmp_path), "TORCH_THREADS": "1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.policy", env=environment)
    try:
        async with rpc.channel(environment["BIND"]) as channel, asyncio.timeout(120):
            await channel.channel_ready()
            stub = PolicyServiceStub(channel)
            answer = await stub.Generate(pb.GenerateRequest(messages=opening(), sampling=GREEDY))
            assert answer.generation.policy_version == "one"
            event = PolicyPublished(policy="policy", version="two", checkpoint_uri=(tmp_path / "two").as_uri())
            await bus.publish(POLICIES, "policy", event.SerializeToString(), {})
            while (await stub.DescribePolicy(pb.DescribePolicyRequest())).card.version != "two":  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await bus.close()


async def test_a_checkpoint_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    environment = {**os.environ, "BIND": f"unix://{tmp_path}/policy.sock", "CHECKPOINT": str(tmp_path / "none")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.policy", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 1
    assert b"no such folder" in errors
