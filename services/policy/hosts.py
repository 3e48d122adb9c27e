"""Where engines live: in this process, or in Triton (`triton_host`)."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import torch

from services.chassis.errors import BadInput
from services.chassis.images import make_image_store
from services.policy.engine import Engine, Host
from services.policy.settings import EngineSettings, PolicySettings
from services.policy.transformers_engine import EngineLimits, TransformersEngine
from services.vlm import checkpoint as checkpoints


class InProcessHost:
    """Engines in this process, one thread each."""

    def __init__(self, settings: EngineSettings) -> None:
        self._settings = settings

    async def open(self, checkpoint: Path, version: str) -> Engine:
        """See services.policy.engine.Host."""
        loading = asyncio.ensure_future(asyncio.to_thread(make_engine, self._settings, checkpoint, version))
        try:
            return await asyncio.shield(loading)
        except asyncio.CancelledError:  # a thread cannot be: what it makes is closed when it comes
            loading.add_done_callback(_close_late)
            raise

    async def close(self) -> None:
        """Nothing of its own to close."""


def _close_late(loading: asyncio.Future[Engine]) -> None:
    if not loading.cancelled() and loading.exception() is None:
        closing = asyncio.ensure_future(loading.result().close())
        _CLOSING.add(closing)
        closing.add_done_callback(_CLOSING.discard)


# Engines that nobody waits for any more; the loop itself keeps no task alive.
_CLOSING: set[asyncio.Future[None]] = set()


def make_host(settings: PolicySettings) -> Host:
    """The host that the settings name."""
    if settings.engine_host == "triton":
        from services.policy.triton_host import TritonHost

        return TritonHost(settings.triton_url, settings)
    return InProcessHost(settings)


def make_engine(settings: EngineSettings, checkpoint: Path, version: str) -> Engine:
    """Loads a checkpoint; blocks. Raises BadInput: the folder is no checkpoint of a model that the engine knows."""
    make = _make_vllm if settings.engine == "vllm" else _make_transformers
    try:
        return make(settings, checkpoint, version)
    except Exception as error:
        # A foreign folder can fail anywhere inside transformers or vLLM: no common base to name here.
        raise BadInput(f"{checkpoint} cannot be loaded: {error}") from error


def _make_vllm(settings: EngineSettings, checkpoint: Path, version: str) -> Engine:
    from services.policy.vllm_engine import VllmEngine

    return VllmEngine(checkpoint, version, make_image_store(settings).load, settings)


def _make_transformers(settings: EngineSettings, checkpoint: Path, version: str) -> Engine:
    policy = checkpoints.load(checkpoint, choose_dtype(settings.dtype), settings.device)
    if version:
        policy.card.version = version
    limits = EngineLimits(
        max_batch=settings.max_batch,
        max_queue=settings.max_queue,
        max_context=settings.max_context,
        prefix_cache_bytes=settings.prefix_cache_mib * 2**20,
        threads=settings.torch_threads,
    )
    return TransformersEngine(policy, make_image_store(settings).load, limits)


def choose_dtype(name: str) -> torch.dtype:
    """`auto` times a matmul of a decoder's size: CPUs without AVX-512 or AMX do bfloat16 up to 30 times slower."""
    if name != "auto":
        return torch.float32 if name == "float32" else torch.bfloat16
    return torch.bfloat16 if _matmul_s(torch.bfloat16) < _matmul_s(torch.float32) else torch.float32


def _matmul_s(dtype: torch.dtype) -> float:
    """Seconds of the fastest of a few [64, 1024] × [1024, 1024]."""
    left, right = torch.ones(64, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
    times = []
    for _ in range(4):
        start = time.perf_counter()
        left @ right
        times.append(time.perf_counter() - start)
    return min(times)
