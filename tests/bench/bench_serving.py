"""The engines side by side as they are served: in the process and in Triton, from one episode at a time to 64.

Run in .venv it measures `transformers`, in .venv-vllm `vllm` (`make bench` runs both). One line of JSON a
measurement, on stdout and in $BENCH_OUT. `large`: a random Qwen3-VL of 69 million parameters, its views of about 448 x
448 pixels.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.agent.protocol import SYSTEM_PROMPT
from services.policy.engine import Engine, Host
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost
from tests.bench.bench_engine import POCKET, WORDS, Pictures
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conftest import ENGINE
from tests.policy.conversations import assistant, system, user

# Episodes measured for so many at once.
EPISODES = {"pocket": {1: 16, 8: 64, 32: 128, 64: 128}, "large": {1: 3, 8: 8, 32: 32, 64: 64}}
NEW_TOKENS = {"pocket": 24, "large": 16}


class Meter:
    """What the turns of a measurement took and brought."""

    def __init__(self, new_tokens: int) -> None:
        self.limit = new_tokens
        self.seconds: list[float] = []
        self.new_tokens = self.prompt_tokens = self.cached_tokens = 0

    async def turn(self, engine: Engine, messages: list[pb.Message], seed: int) -> pb.Generation:
        started = time.perf_counter()
        wish = pb.Sampling(temperature=1, max_new_tokens=self.limit, seed=seed)
        generation = await engine.generate(messages, wish)
        self.seconds.append(time.perf_counter() - started)
        self.new_tokens += len(generation.token_ids)
        self.prompt_tokens += generation.prompt_tokens
        self.cached_tokens += generation.cached_tokens
        return generation


async def measure(
    engine: Engine, pictures: Pictures, turns: int, at_once: int, episodes: int, new_tokens: int
) -> dict[str, float]:
    work = [[pictures.new() for _ in range(turns)] for _ in range(episodes)]
    meter = Meter(new_tokens)

    async def worker() -> None:
        while work:
            images, messages = work.pop(), [system(SYSTEM_PROMPT)]
            for image, words in zip(images, WORDS, strict=False):
                messages.append(user(image, words))
                messages.append(assistant((await meter.turn(engine, messages, len(work))).token_ids))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    seconds = time.perf_counter() - started
    return {
        "episodes_s": round(episodes / seconds, 3),
        "tokens_s": round(meter.new_tokens / seconds, 1),
        "p50_s": round(float(np.quantile(meter.seconds, 0.5)), 3),
        "p99_s": round(float(np.quantile(meter.seconds, 0.99)), 3),
        "prefix_hit_share": round(meter.cached_tokens / meter.prompt_tokens, 3),
    }


def memory_mib() -> float:
    """Proportional set size of this process and all that it started, Triton and its stubs included."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # ended meanwhile
    ours, found = {os.getpid()}, 0
    while found < len(ours):
        found = len(ours)
        ours |= {pid for pid, parent in parents.items() if parent in ours}
    return sum(_pss_kib(pid) for pid in ours) / 1024


def _pss_kib(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


@asynccontextmanager
async def served(request: pytest.FixtureRequest, host_name: str, path: Path, folder: Path) -> AsyncIterator[Engine]:
    settings = EngineSettings(
        engine=ENGINE, image_roots=(str(folder),), max_batch=64, max_queue=64, prefix_cache_mib=2048, max_context=4000
    )
    host: Host = InProcessHost(settings)
    if host_name == "triton":
        host = TritonHost(request.getfixturevalue("triton"), settings)
    engine = await host.open(path, "bench")
    yield engine
    await engine.close()
    await host.close()


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("host_name", ["in_process", pytest.param("triton", marks=pytest.mark.triton)])
@pytest.mark.parametrize("model", EPISODES)
async def test_serving(request: pytest.FixtureRequest, tmp_path: Path, model: str, host_name: str) -> None:
    path = POCKET
    if model == "large":
        path = make_tiny_checkpoint(
            tmp_path / "large", hidden=640, heads=10, layers=13, vision_hidden=384, vision_depth=12, patch=16,
            image_size=448,
        )  # fmt: skip
    pictures, before = Pictures(tmp_path), memory_mib()
    async with served(request, host_name, path, tmp_path) as engine:
        await measure(engine, pictures, 2, 2, 2, NEW_TOKENS[model])
        for turns in (2, 3):
            for at_once, episodes in EPISODES[model].items():
                figures = await measure(engine, pictures, turns, at_once, episodes, NEW_TOKENS[model])
                row = {"engine": ENGINE, "host": host_name, "model": model, "turns": turns, "at_once": at_once}
                report({**row, **figures, "memory_mib": round(memory_mib() - before)})


def report(row: dict[str, object]) -> None:
    line = json.dumps(row)
    print(line, flush=True)
    if path := os.environ.get("BENCH_OUT"):
        with Path(path).open("a") as file:
            file.write(line + "\n")
