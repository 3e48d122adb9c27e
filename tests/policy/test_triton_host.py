"""What is Triton's alone: clients that vanish, and a Triton that dies and comes back."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput, Exhausted, Transient
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost, model_name
from services.policy.triton_server import triton_command
from tests.harness.process import free_port, running, wait_for_port
from tests.policy.conftest import ARCHITECTURES
from tests.policy.conversations import GREEDY, LONG, assistant, fill, free_again, make_image, opening, user

pytestmark = pytest.mark.triton
TWO_PLACES = EngineSettings(torch_threads=1, max_batch=1, max_queue=1)


@pytest.mark.parametrize("version", ["1", "step-100", "2026-11-22T10:00", "a/b c", "ü"])
def test_model_names_differ_as_versions_do(version: str) -> None:
    name = model_name(version)
    assert name.isascii()
    assert "/" not in name
    assert name != model_name(version + "x")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_triton_and_the_process_answer_alike(
    triton: str, tiny_checkpoints: dict[str, Path], architecture: str
) -> None:
    """In Triton: eight at once, prefixes reused. In the process: one at a time, nothing reused."""
    alone = InProcessHost(EngineSettings(torch_threads=1, max_batch=1, prefix_cache_mib=0))
    host = TritonHost(triton, EngineSettings(torch_threads=1))
    here = await alone.open(tiny_checkpoints[architecture], "alike")
    there = await host.open(tiny_checkpoints[architecture], "alike")
    conversations = [opening(seed) for seed in range(8)]
    for turn in range(2):
        wishes = [pb.Sampling(temperature=seed % 2, max_new_tokens=12, seed=seed + turn) for seed in range(8)]
        together = await asyncio.gather(*map(there.generate, conversations, wishes))
        for index, generation in enumerate(together):
            expected = await here.generate(conversations[index], wishes[index])
            assert generation.token_ids == expected.token_ids
            assert generation.log_probabilities == pytest.approx(list(expected.log_probabilities), abs=1e-4)
            assert turn == 0 or generation.cached_tokens > expected.cached_tokens == 0
            conversations[index] += [assistant(generation.token_ids), user(make_image(index + 50), "Image 2: closer.")]
    for engine in (here, there):
        await engine.close()
    await host.close()


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


async def test_a_model_whose_process_was_killed_is_loaded_anew(tiny_checkpoint: Path, tmp_path: Path) -> None:
    port = free_port()
    host = TritonHost(f"127.0.0.1:{port}", EngineSettings(torch_threads=1))
    with triton_command(port) as (command, environment):
        process = running(command, tmp_path / "log", environment)
        wait_for_port(port, process, tmp_path / "log", 60)
        engine = await host.open(tiny_checkpoint, "killed")
        before = await engine.generate(opening(), GREEDY)
        under_way = [asyncio.create_task(engine.generate(opening(seed), LONG)) for seed in (1, 2)]
        await engine.generate(opening(3), pb.Sampling(max_new_tokens=1))
        kill_stub(process.pid)
        for request in under_way:
            with pytest.raises(Transient):
                await request
        after = await engine.generate(opening(), GREEDY)
        assert after.token_ids == before.token_ids
        await engine.close()
        await host.close()
        process.terminate()
        process.wait(30)


async def test_a_model_whose_engine_breaks_is_loaded_anew(triton: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    # A token that the tokenizer knows and the embedding lacks.
    torn = Path(shutil.copytree(tiny_checkpoint, tmp_path / "torn"))
    tokenizer = AutoTokenizer.from_pretrained(torn)
    tokenizer.add_tokens([f"<extra {number}>" for number in range(10)])
    tokenizer.save_pretrained(torn)
    host = TritonHost(triton, EngineSettings(torch_threads=1))
    engine = await host.open(torn, "torn")
    before = await engine.generate(opening(), GREEDY)
    under_way = asyncio.create_task(engine.generate(opening(1), LONG))
    await engine.generate(opening(2), pb.Sampling(max_new_tokens=1))
    with pytest.raises(Transient, match="failed"):
        await engine.generate([user("?"), assistant([len(tokenizer) - 1])], GREEDY)
    with pytest.raises(Transient):
        await under_way
    with pytest.raises(Transient, match="not healthy"):
        await engine.generate(opening(), GREEDY)
    after = await engine.generate(opening(), GREEDY)
    assert after.token_ids == before.token_ids
    await engine.close()
    await host.close()


def kill_stub(triton: int) -> None:
    """Kills the process in which Triton runs its one Python model."""
    stubs = subprocess.run(["pgrep", "-P", str(triton), "-f", "triton_python_backend_stub"], capture_output=True)
    os.kill(int(stubs.stdout), signal.SIGKILL)
