"""Versions are published while requests never cease: nothing fails, nothing mixes."""

from __future__ import annotations

import asyncio
import itertools
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.events_pb2 import PolicyPublished
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.errors import BadInput
from services.chassis.topics import POLICIES, TOPICS
from services.policy.following import follow
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost
from services.policy.versions import Versions
from services.vlm.checkpoint import sha256_of
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conftest import ENGINE
from tests.policy.conversations import assistant, eventually, make_image, opening, user

REQUESTS, CONCURRENT = 500, 16


class Load:
    """Episodes of two turns, `CONCURRENT` at a time, for as long as `wanted` says. Keeps which version spoke when."""

    def __init__(self, versions: Versions, wanted: Callable[[Load], bool]) -> None:
        self._versions, self._wanted, self._seeds = versions, wanted, itertools.count()
        self.answers: list[tuple[float, str]] = []
        self.spoken: list[tuple[str, str]] = []  # by the two turns of each episode

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENT):
                group.create_task(self._work())

    @property
    def longest_pause_s(self) -> float:
        times = [at for at, _ in self.answers]
        return max(after - before for before, after in itertools.pairwise(times))

    async def _work(self) -> None:
        while self._wanted(self):
            seed = next(self._seeds)
            messages = opening(seed)
            first = await self._turn(messages, seed, "")
            messages += [assistant(first.token_ids), user(make_image(seed + 1), "Image 2: closer.")]
            second = await self._turn(messages, seed, first.policy_version)
            self.spoken.append((first.policy_version, second.policy_version))

    async def _turn(self, messages: list[pb.Message], seed: int, version: str) -> pb.Generation:
        wish = pb.Sampling(temperature=1, max_new_tokens=8 + seed % 16, seed=seed)
        generation = await self._versions.generate(messages, wish, version)
        self.answers.append((time.monotonic(), generation.policy_version))
        return generation


def broken(path: Path) -> Path:
    """Loads, and then computes nonsense: its weights are no numbers."""
    made = make_tiny_checkpoint(path, seed=9, version="broken")
    weights = load_file(made / "model.safetensors")
    name = "model.language_model.norm.weight"
    weights[name] = weights[name] * float("nan")
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    return made


def torn(path: Path, whole: Path) -> Path:
    """Half of its file is missing."""
    shutil.copytree(whole, path)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.timeout(600)
@pytest.mark.parametrize("host_name", ["in_process", pytest.param("triton", marks=pytest.mark.triton)])
async def test_versions_are_swapped_under_load(
    request: pytest.FixtureRequest, host_name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = EngineSettings(engine=ENGINE, torch_threads=1, max_context=600, prefix_cache_mib=256)
    triton = request.getfixturevalue("triton") if host_name == "triton" else ""
    versions = Versions(TritonHost(triton, settings) if triton else InProcessHost(settings))
    paths = {name: make_tiny_checkpoint(tmp_path / name, seed=seed, version=name) for seed, name in enumerate("abc")}
    paths |= {"broken": broken(tmp_path / "broken"), "torn": torn(tmp_path / "torn", paths["a"])}
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(TOPICS)
    stop, dealt = asyncio.Event(), asyncio.Event()
    refused: list[str] = []

    async def load_published(uri: str, sha256: str, version: str) -> object:
        try:
            return await versions.load(Path(uri), sha256=sha256, version=version)
        except BadInput:
            refused.append(version)
            raise
        finally:
            dealt.set()

    async def publish(name: str) -> None:
        event = PolicyPublished(
            policy="policy", version=name, checkpoint_uri=str(paths[name]), sha256=sha256_of(paths[name])
        )
        await bus.publish(POLICIES, "policy", event.SerializeToString(), {})

    async def publish_in_turn() -> None:
        # Each when the one before is dealt with: else only the newest would be loaded.
        for name in ("b", "broken", "torn", "c"):
            dealt.clear()
            await publish(name)
            await dealt.wait()
            answers = len(load.answers)
            await eventually(lambda start=answers: len(load.answers) >= start + 50)  # type: ignore[misc]

    load = Load(versions, lambda load: len(load.answers) < REQUESTS or sum(v == "c" for _, v in load.answers) < 50)
    await versions.load(paths["a"])
    async with asyncio.TaskGroup() as group:
        following = group.create_task(follow(bus, "policy", load_published, stop, asyncio.Event()))
        publishing = group.create_task(publish_in_turn())
        await load.run()
        await publishing
        stop.set()
        await following
    await versions.close()
    await bus.close()

    assert refused == ["broken", "torn"]
    assert len(load.answers) >= REQUESTS
    assert {version for _, version in load.answers} == {"a", "b", "c"}
    assert all(first == second for first, second in load.spoken)
    with capsys.disabled():
        print(f"\n{ENGINE} {host_name}: {len(load.answers)} answers, longest pause {load.longest_pause_s:.2f} s")
