"""What is Triton's alone: clients that vanish, and a Triton that dies and comes back."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.chassis.errors import BadInput, Exhausted, Transient
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost, model_name
from services.policy.triton_server import triton_command
from tests.harness.process import free_port, running, wait_for_port
from tests.policy.conversations import GREEDY, LONG, fill, free_again, opening

pytestmark = pytest.mark.triton
TWO_PLACES = EngineSettings(torch_threads=1, max_batch=1, max_queue=1)


@pytest.mark.parametrize("version", ["1", "step-100", "2026-11-22T10:00", "a/b c", "ü"])
def test_model_names_differ_as_versions_do(version: str) -> None:
    name = model_name(version)
    assert name.isascii()
    assert "/" not in name
    assert name != model_name(version + "x")


async def test_a_client_that_vanishes_frees_its_place(triton: str, tiny_checkpoint: Path) -> None:
    staying, vanishing = TritonHost(triton, TWO_PLACES), TritonHost(triton, TWO_PLACES)
    engine = await staying.open(tiny_checkpoint, "vanishing")
    requests = await fill(await vanishing.open(tiny_checkpoint, "vanishing"))
    with pytest.raises(Exhausted):
        await engine.generate(opening(), GREEDY)
    await vanishing.close()
    for request in requests:
        with pytest.raises(Transient):
            await request
    await free_again(engine)
    await engine.close()
    await staying.close()


async def test_a_checkpoint_that_triton_cannot_load(triton: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    host = TritonHost(triton, EngineSettings())
    with pytest.raises(BadInput, match="no safetensors"):
        await host.open(tmp_path, "empty")
    (tmp_path / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes())
    with pytest.raises(BadInput, match=r"Triton cannot load .*config.json is missing"):
        await host.open(tmp_path, "torn")
    await host.close()


async def test_a_triton_that_was_killed_is_found_again(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    host = TritonHost(f"127.0.0.1:{port}", EngineSettings(torch_threads=1))
    with triton_command(port) as (command, environment):
        process = running(command, tmp_path / "log", environment)
        wait_for_port(port, process, tmp_path / "log", 60)
        engine = await host.open(tiny_checkpoint, "back")
        before = await engine.generate(opening(), GREEDY)
        under_way = asyncio.create_task(engine.generate(opening(1), LONG))
        await engine.generate(opening(2), GREEDY)
        process.kill()
        process.wait()
        with pytest.raises(Transient):
            await under_way
        with pytest.raises(Transient):
            await engine.generate(opening(), GREEDY)
        process = running(command, tmp_path / "log", environment)
        wait_for_port(port, process, tmp_path / "log", 60)
        async with asyncio.timeout(120):
            while True:
                try:
                    after = await engine.generate(opening(), GREEDY)
                    break
                except Transient:
                    await asyncio.sleep(0.1)
        assert after.token_ids == before.token_ids
        await host.close()
        process.terminate()
        process.wait(30)
