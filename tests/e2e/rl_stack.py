"""The parts of an RL run as processes, each started again when it ends, as an orchestrator would; and what a run leaves
behind as evidence: its checkpoint, its metrics and what lies in the topics.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from google.protobuf.message import Message
from redis import Redis

from agentiad.v1.events_pb2 import PolicyPublished, TrajectoryCompleted, TrajectoryScored
from services.chassis import topics
from services.chassis.bus import Bus, make_bus
from services.chassis.settings import BusSettings
from services.cli.processes import Child, ready
from services.policy.settings import PolicySettings
from services.policy.triton_server import triton_command
from tests.harness.kafka import Broker, kafka
from tests.harness.process import POLL_S, free_port
from tests.harness.redis import redis

BASE = Path(PolicySettings.model_fields["checkpoint"].default)
POLICY = topics.candidate_of("policy")
# For whatever one waits for: this many times longer than it takes on two busy cores.
PATIENCE_S = 150.0
SERVICES = ("zoom", "retrieval", "policy", "reward", "agent")
M = TypeVar("M", bound=Message)


def command(*program: str | Path, out: Path, steps: int, **changes: object) -> list[str]:
    """The command of a run of a few small groups."""
    values = {
        "steps": steps,
        "publish_every": 1,
        "groups": 2,
        "group_size": 4,
        "prompts": 12,
        "measured": 0,
        "threads": 1,
        **changes,
    }
    words = [word for name, value in values.items() for word in ("--set", f"{name}={value}")]
    return [*map(str, program), "--base", str(BASE), "--out", str(out), *words]


class Part:
    """A process, and the next one when it has ended other than well."""

    def __init__(self, name: str, argv: Sequence[str], environment: Mapping[str, str], log: Path) -> None:
        self.name, self.log = name, log
        self._argv, self._environment = argv, environment
        self.starts = 0

    async def start(self) -> None:
        self.process = await self._begin()
        self.ended_well = asyncio.create_task(self._keep())

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        self.ended_well.cancel()
        with contextlib.suppress(ProcessLookupError):
            self.kill()
        await self.process.wait()

    async def _begin(self) -> asyncio.subprocess.Process:
        self.starts += 1
        with self.log.open("ab") as output:
            # A session of its own: what it started itself dies with it, as in a container.
            return await asyncio.create_subprocess_exec(
                *self._argv, env=self._environment, stdout=output, stderr=output, start_new_session=True
            )

    async def _keep(self) -> None:
        while await self.process.wait():
            self.process = await self._begin()


@dataclass
class RlStack:
    """`folder`: holds a folder a run, which the policy may load versions from."""

    bus: Bus
    broker: Broker
    folder: Path
    environment: dict[str, str]
    running: AsyncExitStack = field(repr=False)
    parts: dict[str, Part] = field(default_factory=dict)

    async def start(self, name: str, argv: Sequence[str], **changes: str) -> Part:
        part = Part(name, argv, {**self.environment, **changes}, self.folder / f"{name}.log")
        await part.start()
        self.running.push_async_callback(part.stop)
        self.parts[name] = part
        return part

    async def start_trainer(self, out: Path, steps: int, **changes: object) -> Part:
        argv = command(sys.executable, "-m", "services.trainer", "rl", out=out, steps=steps, **changes)
        return await self.start("trainer", argv)

    def unfinished(self, out: Path) -> int:
        """How many episodes of the run have been begun and not ended."""
        with Redis.from_url(self.environment["REDIS_URL"]) as records:
            run = (out / "work" / "run").read_text()
            return len(records.keys(f"agentiad:{TrajectoryCompleted.DESCRIPTOR.name}:steps:{run}/*"))

    async def kill(self, victim: str) -> None:
        """Returns when the victim is being started again, or, for the broker, is back."""
        if victim == "broker":
            self.broker.stop()
            await asyncio.to_thread(self.broker.start)
            return
        part, starts = self.parts[victim], self.parts[victim].starts
        part.kill()
        await until(lambda: part.starts > starts, part)


@asynccontextmanager
async def rl_stack(folder: Path, *, triton: bool) -> AsyncIterator[RlStack]:
    """Everything but the trainer, on Kafka; the model in Triton, or in the policy's process."""
    async with AsyncExitStack() as running:
        broker = running.enter_context(kafka())
        addresses = {f"{name.upper()}_ADDRESS": f"127.0.0.1:{free_port()}" for name in SERVICES}
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "TORCH_THREADS": "1",
            "DATA_DIR": str(folder), "IMAGE_ROOTS": str(folder), "IMAGE_STORE": str(folder / "images"),
            "MILVUS_URI": str(folder / "exemplars.db"), "REDIS_URL": running.enter_context(redis()),
            "KAFKA_BOOTSTRAP_SERVERS": broker.address, "CHECKPOINT": str(BASE), "CHECKPOINT_ROOTS": str(folder),
            "POLICY_NAME": POLICY, "WORK": "rollout", **addresses,
        }  # fmt: skip
        bus = make_bus(BusSettings(kafka_bootstrap_servers=broker.address))
        running.push_async_callback(bus.close)
        await bus.ensure_topics(topics.TOPICS)
        stack = RlStack(bus, broker, folder, environment, running)
        if triton:
            await _start_triton(stack)
        for name in SERVICES:
            # Under a name that outlives it, a member of a group need not wait until its predecessor counts as dead.
            changes = {"BIND": addresses[f"{name.upper()}_ADDRESS"], "KAFKA_GROUP_INSTANCE_ID": name}
            await stack.start(name, [sys.executable, "-m", f"services.{name}"], **changes)
        for name in SERVICES:
            child = Child(name, stack.parts[name].process)
            await ready(child, addresses[f"{name.upper()}_ADDRESS"], asyncio.Event())
        yield stack


async def _start_triton(stack: RlStack) -> None:
    port = free_port()
    argv, environment = stack.running.enter_context(triton_command(port))
    part = await stack.start("triton", argv, **environment)
    stack.environment |= {"ENGINE_HOST": "triton", "TRITON_URL": f"127.0.0.1:{port}"}
    await until(lambda: part.log.exists() and b"Started GRPCInferenceService" in part.log.read_bytes(), part)


async def until(condition: Callable[[], bool], part: Part) -> None:
    """Returns when it holds. AssertionError with the end of the part's log: it is too late, or the part has ended."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if condition() or part.ended_well.done():
                    break
                await asyncio.sleep(POLL_S)  # nothing tells us when another process writes a file
    assert condition(), f"{part.name}:\n{part.log.read_text(errors='replace')[-3000:]}"


def metrics_of(out: Path) -> list[dict[str, Any]]:
    """The whole lines so far."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_step(out: Path) -> int:
    return max((row["step"] for row in metrics_of(out)), default=0)


def trained_groups(out: Path) -> list[list[str]]:
    """Of each step, as the checkpoint tells."""
    trained: list[list[str]] = torch.load(out / "work" / "state.pt", weights_only=True)["trained"]
    return trained


@dataclass(frozen=True)
class Topics:
    """What lies in them of one run. `trajectories` and `scored`: different copies by event id."""

    versions: list[PolicyPublished]
    trajectories: dict[str, list[TrajectoryCompleted]]
    scored: dict[str, list[TrajectoryScored]]


async def read_topics(bus: Bus, out: Path) -> Topics:
    run = (out / "work" / "run").read_text()
    published = [each for _, each in await _lying(bus, topics.POLICIES, PolicyPublished)]
    versions = [each for each in published if each.policy == POLICY and f"{out.resolve()}/" in each.checkpoint_uri]
    trajectories = _copies(await _lying(bus, topics.TRAJECTORIES, TrajectoryCompleted), f"{run}/")
    scored = _copies(await _lying(bus, topics.SCORED_TRAJECTORIES, TrajectoryScored), f"{run}/")
    return Topics(versions, trajectories, scored)


async def _lying(bus: Bus, topic: str, kind: type[M]) -> list[tuple[str, M]]:
    """(key, message) of all that lies in the topic now."""
    done = asyncio.Event()
    events = bus.read(topic, from_beginning=True, stop=done, caught_up=done)
    return [(event.key, kind.FromString(event.value)) async for event in events]


def _copies(lying: Sequence[tuple[str, Any]], prefix: str) -> dict[str, list[Any]]:
    found: dict[str, dict[bytes, Any]] = defaultdict(dict)
    for key, message in lying:
        if key.startswith(prefix):
            found[message.event_id][message.SerializeToString(deterministic=True)] = message
    return {name: list(copies.values()) for name, copies in found.items()}
