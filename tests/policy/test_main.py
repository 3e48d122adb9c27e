"""The policy as a process: starts, answers, takes over published versions, obeys SIGTERM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc

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
    async with started(tmp_path) as (process, stub):
        answer = await stub.Generate(pb.GenerateRequest(messages=opening(), sampling=GREEDY))
        assert answer.generation.policy_version == "one"
        await publish(bus, "two", (tmp_path / "two").as_uri())
        while (await stub.DescribePolicy(pb.DescribePolicyRequest())).card.version != "two":  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    await bus.close()


async def test_a_restarted_process_answers_with_the_newest_version_that_can_be_had(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        make_tiny_checkpoint(tmp_path / name, seed=seed, version=name)
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(TOPICS)
    await publish(bus, "two", (tmp_path / "two").as_uri())
    for uri in (f"{tmp_path.as_uri()}/{'x' * 300}", f"{tmp_path.as_uri()}/%00", "file://[x", f"{tmp_path}/none", ""):
        await publish(bus, "broken", uri)
    async with started(tmp_path) as (_, stub):
        assert (await stub.DescribePolicy(pb.DescribePolicyRequest())).card.version == "two"
    await bus.close()


async def test_a_process_whose_published_versions_cannot_be_had_answers_with_its_own(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "one", version="one")
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(TOPICS)
    await publish(bus, "gone", str(tmp_path / "gone"))
    async with started(tmp_path) as (_, stub):
        assert (await stub.DescribePolicy(pb.DescribePolicyRequest())).card.version == "one"
    await bus.close()


async def publish(bus: SqliteBus, version: str, uri: str) -> None:
    event = PolicyPublished(policy="policy", version=version, checkpoint_uri=uri)
    await bus.publish(POLICIES, "policy", event.SerializeToString(), {})


@asynccontextmanager
async def started(folder: Path) -> AsyncIterator[tuple[asyncio.subprocess.Process, PolicyServiceStub]]:
    """A process that begins with the checkpoint `one`, once its health check says SERVING."""
    environment = {
        **os.environ, "BIND": f"unix://{folder}/policy.sock", "CHECKPOINT": str(folder / "one"),
        "CHECKPOINT_ROOTS": str(folder), "DATA_DIR": str(folder), "TORCH_THREADS": "1",
    }  # fmt: skip
    process = await asyncio.create_subprocess_exec(sys.executable, "-m", "services.policy", env=environment)
    try:
        async with rpc.channel(environment["BIND"]) as channel, asyncio.timeout(120):
            await channel.channel_ready()
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            yield process, PolicyServiceStub(channel)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def test_a_checkpoint_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    environment = {**os.environ, "BIND": f"unix://{tmp_path}/policy.sock", "CHECKPOINT": str(tmp_path / "none")}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.policy", env=environment, stderr=asyncio.subprocess.PIPE
    )
    _, errors = await asyncio.wait_for(process.communicate(), 120)
    assert process.returncode == 1
    assert b"no such folder" in errors
