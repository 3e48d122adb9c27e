"""What is vLLM's alone: its process may wait without end, refuse a request, or die."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput, Transient
from services.policy.settings import EngineSettings
from tests.policy.conversations import GREEDY, LONG, eventually, opening, user

if find_spec("vllm") is None:
    pytest.skip("vllm is not installed here: make install-vllm", allow_module_level=True)

from vllm import SamplingParams
from vllm.inputs.engine import tokens_input

from services.policy.hosts import make_engine
from services.policy.vllm_engine import VllmEngine, _Request

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(180)]
SETTINGS = EngineSettings(engine="vllm", max_context=600, prefix_cache_mib=256, torch_threads=1)


@asynccontextmanager
async def served(checkpoint: Path) -> AsyncIterator[VllmEngine]:
    engine = await asyncio.to_thread(make_engine, SETTINGS, checkpoint, "v")
    assert isinstance(engine, VllmEngine)
    try:
        yield engine
    finally:
        async with asyncio.timeout(60):
            await engine.close()


async def test_nobody_waits_for_a_vllm_that_has_nothing_to_say(tiny_checkpoint: Path) -> None:
    async with served(tiny_checkpoint) as engine:
        for seed in range(6):  # the only request is cancelled, at another point of its step each time
            lone = asyncio.create_task(engine.generate(opening(seed), LONG))
            await eventually(lambda: bool(engine._running))
            await asyncio.sleep(0.03 * seed)
            lone.cancel()
            async with asyncio.timeout(30):
                assert (await engine.generate([user("hello")], GREEDY)).token_ids

        # Refused by vLLM itself, while it is idle.
        outcomes: list[object] = []
        refused = _Request(tokens_input([10**6]), SamplingParams(max_tokens=1), [], outcomes.append)
        engine._arrivals.put(refused)
        await eventually(lambda: bool(outcomes))
        assert isinstance(outcomes[0], BadInput)
        async with asyncio.timeout(30):
            assert (await engine.generate([user("hello")], GREEDY)).token_ids

        under_way = asyncio.create_task(engine.generate(opening(9), LONG))
        await eventually(lambda: bool(engine._running))
        async with asyncio.timeout(60):
            await engine.close()
        with pytest.raises(Transient, match="closed"):
            await under_way


async def test_a_vllm_that_was_killed_fails_everybody_and_says_so(tiny_checkpoint: Path) -> None:
    async with served(tiny_checkpoint) as engine:
        under_way = [asyncio.create_task(engine.generate(opening(seed), LONG)) for seed in range(3)]
        await eventually(lambda: len(engine._running) == 3)
        manager = engine._engine.engine_core.resources.engine_manager
        os.kill(manager.processes[0].pid, signal.SIGKILL)
        async with asyncio.timeout(60):
            results = await asyncio.gather(*under_way, return_exceptions=True)
        assert all(isinstance(result, Exception) and not isinstance(result, BadInput) for result in results)
        with pytest.raises(RuntimeError, match="failed"):
            await engine.generate([user("hello")], GREEDY)


async def test_cancellation_frees_keys_and_values(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that its blocks can be counted
    async with served(tiny_checkpoint) as engine:
        blocks = engine._engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        before = blocks.get_num_free_blocks()
        for _ in range(3):
            tasks = [asyncio.create_task(engine.generate(opening(seed), LONG)) for seed in range(8)]
            await eventually(lambda: blocks.get_num_free_blocks() < before)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            await eventually(lambda: blocks.get_num_free_blocks() == before)
        generation = await engine.generate([user("hello")], pb.Sampling(max_new_tokens=4))
        assert len(generation.token_ids) == 4
