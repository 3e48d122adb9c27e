"""Checkpoints and engines that several tests share; each is made once."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import pytest
import pytest_asyncio
from _pytest.mark import ParameterSet

from services.policy.engine import Engine
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost
from services.vlm import checkpoint
from services.vlm.checkpoint import LoadedPolicy
from tests.policy.checkpoints import make_tiny_checkpoint

# The environment decides: .venv has the engine `transformers`, .venv-vllm (make install-vllm) has `vllm`.
ENGINE: Literal["transformers", "vllm"] = "vllm" if find_spec("vllm") else "transformers"
ARCHITECTURES = ("qwen3_vl", "qwen2_5_vl")


@dataclass(frozen=True)
class Site:
    """One checkpoint, served: `engine` as by default; `strict` without prefixes, one at a time, one in the queue."""

    path: Path
    engine: Engine
    strict: Engine
    reference: LoadedPolicy
    pictures: Path
    # Prefixes are found in multiples of so many tokens.
    block: int

    def cached(self, tokens: int) -> int:
        """How many of `tokens` known ones a prompt finds."""
        return tokens // self.block * self.block


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_tiny_checkpoint(tmp_path_factory.mktemp(name), name) for name in ARCHITECTURES}


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoints: dict[str, Path]) -> Path:
    return tiny_checkpoints["qwen3_vl"]


def _sites() -> list[ParameterSet]:
    """(architecture, host): every pair; for vllm, which takes half a minute to load, each of the four once."""
    pairs = [(architecture, host) for architecture in ARCHITECTURES for host in ("in_process", "triton")]
    if ENGINE == "vllm":
        pairs = list(zip(ARCHITECTURES, ("in_process", "triton"), strict=True))
    return [
        pytest.param(pair, id="-".join((ENGINE, *pair)), marks=[pytest.mark.triton] * ("triton" in pair))
        for pair in pairs
    ]


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=_sites())
async def site(
    request: pytest.FixtureRequest, tiny_checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    architecture, host_name = request.param
    path, pictures = tiny_checkpoints[architecture], tmp_path_factory.mktemp("pictures")
    settings = EngineSettings(image_roots=(str(pictures),), torch_threads=1, max_context=600, engine=ENGINE)
    strict = settings.model_copy(update={"max_batch": 1, "max_queue": 1, "prefix_cache_mib": 0, "image_cache_mib": 0})

    def make_host(settings: EngineSettings) -> InProcessHost | TritonHost:
        if host_name == "triton":
            return TritonHost(request.getfixturevalue("triton"), settings)
        return InProcessHost(settings)

    hosts = make_host(settings), make_host(strict)
    engines = await hosts[0].open(path, "default"), await hosts[1].open(path, "strict")
    yield Site(path, *engines, checkpoint.load(path), pictures, block=32 if ENGINE == "vllm" else 1)
    for engine in engines:
        await engine.close()
    for host in hosts:
        await host.close()
