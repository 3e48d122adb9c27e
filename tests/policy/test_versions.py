"""Versions of a real engine, in the process and in Triton: load beside, warm up, take over; failures change nothing."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from services.policy.engine import Host
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.transformers_engine import TransformersEngine
from services.policy.triton_host import TritonHost
from services.policy.versions import Versions
from services.vlm.checkpoint import sha256_of
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conversations import GREEDY, LONG, eventually, opening

SETTINGS = EngineSettings(torch_threads=1)
ONE_TOKEN = pb.Sampling(max_new_tokens=1)


@pytest_asyncio.fixture(params=["in_process", pytest.param("triton", marks=pytest.mark.triton)])
async def host(request: pytest.FixtureRequest) -> Host:
    if request.param == "triton":
        return TritonHost(request.getfixturevalue("triton"), SETTINGS)
    return InProcessHost(SETTINGS)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("first"), seed=1, version="one")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("second"), seed=2, version="two")


@pytest_asyncio.fixture
async def versions() -> AsyncIterator[Versions]:
    made = Versions(InProcessHost(SETTINGS), kept=2, idle_s=60)
    yield made
    await made.close()


async def test_a_new_version_takes_over_and_requests_under_way_end_on_the_old(
    host: Host, first: Path, second: Path
) -> None:
    versions = Versions(host, idle_s=60)
    await versions.load(first)
    under_way = [asyncio.create_task(versions.generate(opening(seed), LONG)) for seed in range(3)]
    loading = asyncio.create_task(versions.load(second, sha256=sha256_of(second)))
    # Requests are answered all the while.
    while not loading.done():
        assert (await versions.generate(opening(), GREEDY)).policy_version in ("one", "two")
    assert (await loading).version == versions.current.version == "two"
    assert (await versions.generate(opening(), GREEDY)).policy_version == "two"
    assert {generation.policy_version for generation in await asyncio.gather(*under_way)} == {"one"}
    # An episode that began with the old version goes on with it.
    assert (await versions.generate(opening(), GREEDY, "one")).policy_version == "one"
    await versions.close()


async def test_a_version_that_cannot_be_loaded_changes_nothing(host: Host, first: Path, tmp_path: Path) -> None:
    versions = Versions(host)
    await versions.load(first)
    before = await versions.generate(opening(), GREEDY)
    for broken in broken_checkpoints(first, tmp_path):
        with pytest.raises(BadInput):
            await versions.load(broken, version=broken.name)
        with pytest.raises(NotFound):
            await versions.generate(opening(), GREEDY, broken.name)
    after = await versions.generate(opening(), GREEDY)
    assert (after.token_ids, after.policy_version) == (before.token_ids, "one")
    assert not versions.failed.done()
    await versions.close()


def broken_checkpoints(good: Path, folder: Path) -> list[Path]:
    """A weight file cut short, and one whose numbers are none."""
    torn, nan = folder / "torn", folder / "nan"
    shutil.copytree(good, torn)
    shutil.copytree(good, nan)
    content = (good / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(content[: len(content) // 2])
    weights = {
        name: torch.full_like(weight, torch.nan) for name, weight in load_file(good / "model.safetensors").items()
    }
    save_file(weights, nan / "model.safetensors", metadata={"format": "pt"})
    return [torn, nan]


async def test_another_digest_is_refused(versions: Versions, first: Path) -> None:
    with pytest.raises(BadInput, match="sha256"):
        await versions.load(first, sha256="0" * 64)
    with pytest.raises(Transient, match="no policy version"):
        _ = versions.current


async def test_before_the_first_version_there_is_none(versions: Versions) -> None:
    with pytest.raises(Transient, match="no policy version"):
        await versions.generate(opening(), GREEDY)


async def test_an_unknown_version_is_not_found(versions: Versions, first: Path) -> None:
    await versions.load(first)
    with pytest.raises(NotFound, match="seven"):
        await versions.generate(opening(), GREEDY, "seven")


async def test_a_name_for_the_version_may_be_given(versions: Versions, first: Path) -> None:
    assert (await versions.load(first, version="v7")).version == "v7"
    assert (await versions.generate(opening(), GREEDY)).policy_version == "v7"


async def test_a_loaded_version_just_takes_over_again(versions: Versions, first: Path, second: Path) -> None:
    await versions.load(first)
    await versions.load(second)
    await versions.load(first)
    assert versions.current.version == "one"
    assert (await versions.generate(opening(), GREEDY, "two")).policy_version == "two"


async def test_one_name_means_one_set_of_weights(versions: Versions, first: Path, second: Path) -> None:
    await versions.load(first)
    with pytest.raises(BadInput, match="other weights"):
        await versions.load(second, version="one")
    assert (await versions.generate(opening(), GREEDY)).policy_version == "one"


async def test_the_oldest_goes_when_there_are_too_many(versions: Versions, first: Path) -> None:
    for name in ("a", "b", "c"):
        await versions.load(first, version=name)
    with pytest.raises(NotFound):
        await versions.generate(opening(), GREEDY, "a")
    assert (await versions.generate(opening(), GREEDY, "b")).policy_version == "b"


async def test_one_that_is_busy_goes_after_its_last_request(versions: Versions, first: Path) -> None:
    await versions.load(first, version="a")
    under_way = asyncio.create_task(versions.generate(opening(), LONG))
    await asyncio.sleep(0)
    for name in ("b", "c"):
        await versions.load(first, version=name)
    assert (await under_way).policy_version == "a"
    with pytest.raises(NotFound):
        await versions.generate(opening(), GREEDY, "a")


async def test_a_replaced_version_that_is_idle_is_closed(first: Path, second: Path) -> None:
    versions = Versions(InProcessHost(SETTINGS), kept=3, idle_s=0.05)
    await versions.load(first)
    await versions.load(second)
    await eventually(lambda: versions.loaded == ["two"])
    assert (await versions.generate(opening(), GREEDY)).policy_version == "two"
    await versions.close()


async def test_traffic_on_the_current_version_does_not_keep_the_others(first: Path, second: Path) -> None:
    versions = Versions(InProcessHost(SETTINGS), kept=3, idle_s=2)
    await versions.load(first)
    await versions.load(second)
    async with asyncio.timeout(60):
        while "one" in versions.loaded:
            await versions.generate(opening(), ONE_TOKEN)
    await versions.close()


async def test_a_request_keeps_a_replaced_version(first: Path, second: Path) -> None:
    versions = Versions(InProcessHost(SETTINGS), kept=3, idle_s=0.05)
    await versions.load(first)
    await versions.load(second)
    assert (await versions.generate(opening(), LONG, "one")).policy_version == "one"
    await eventually(lambda: versions.loaded == ["two"])
    await versions.close()


class Unready(InProcessHost):
    """The engine is gone (its host restarts), or it is full, when its warm-up begins."""

    def __init__(self, why: type[Exception]) -> None:
        super().__init__(EngineSettings(torch_threads=1, max_batch=1, max_queue=0))
        self._why = why
        self.engines: list[TransformersEngine] = []
        self.occupying: asyncio.Task[object] | None = None

    async def open(self, checkpoint: Path, version: str) -> TransformersEngine:
        engine = await super().open(checkpoint, version)
        self.engines.append(engine)
        if self._why is Transient:
            await engine.close()
        else:
            self.occupying = asyncio.create_task(engine.generate(opening(), LONG))
            await asyncio.sleep(0)
        return engine


@pytest.mark.parametrize("why", [Transient, Exhausted])
async def test_a_host_that_is_not_ready_is_no_fault_of_the_version(first: Path, why: type[Exception]) -> None:
    host = Unready(why)
    versions = Versions(host)
    with pytest.raises(why):
        await versions.load(first)
    assert versions.loaded == []
    # It was closed: nobody else would do it.
    if host.occupying is not None:
        with pytest.raises(Transient, match="closed"):
            await host.occupying
    with pytest.raises(Transient, match="closed"):
        await host.engines[0].generate(opening(), GREEDY)
    await versions.close()


async def test_closing_ends_what_is_under_way(first: Path) -> None:
    versions = Versions(InProcessHost(SETTINGS))
    await versions.load(first)
    under_way = asyncio.create_task(versions.generate(opening(), LONG))
    await versions.generate(opening(), GREEDY)
    await versions.close()
    with pytest.raises(Transient):
        await under_way
