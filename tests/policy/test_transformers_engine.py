"""What is this engine's alone: its memory limit, and what happens when the model itself breaks."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.chassis.errors import Transient
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.policy.versions import Versions
from services.vlm import checkpoint
from services.vlm.render import Renderer
from tests.policy import reference
from tests.policy.conversations import GREEDY, LONG, assistant, opening, user


async def test_the_memory_limit_evicts_and_answers_stay_right(tiny_checkpoint: Path) -> None:
    """One MiB holds about a thousand tokens of the tiny model: some prefixes are there, some are not."""
    engine = await InProcessHost(EngineSettings(prefix_cache_mib=1, torch_threads=1)).open(tiny_checkpoint, "")
    policy = checkpoint.load(tiny_checkpoint)
    expected = {seed: reference.greedy_ids(policy, opening(seed), 16) for seed in range(3)}
    for round_number in range(3):
        await asyncio.gather(*(engine.generate(opening(seed), LONG) for seed in range(100, 108)))
        for seed, ids in expected.items():
            generation = await engine.generate(opening(seed), GREEDY)
            assert list(generation.token_ids) == ids, round_number
    assert 0 < engine.prefix_bytes <= 2**20
    await engine.close()


async def test_forced_text_and_earlier_turns_share_their_prefix(tiny_checkpoint: Path) -> None:
    """A probe for the verdict after each turn costs little: all but the forced words is there already."""
    engine = await InProcessHost(EngineSettings(torch_threads=1)).open(tiny_checkpoint, "")
    first = await engine.generate(opening(), GREEDY)
    probe = await engine.generate([*opening(), assistant('<answer>{"anomaly_present":')], GREEDY)
    assert probe.cached_tokens == first.prompt_tokens
    other = await engine.generate([opening()[0], user("another part")], GREEDY)
    system_only = Renderer.from_checkpoint(tiny_checkpoint)
    assert other.cached_tokens == 0  # the system message alone is kept where an image follows it
    third = await engine.generate(opening(seed=9), GREEDY)
    before_image = system_only.render(opening())
    lengths = [len(chunk.ids) for chunk in before_image[:4] if hasattr(chunk, "ids")]
    assert third.cached_tokens == sum(lengths)
    await engine.close()


async def test_a_broken_engine_fails_everybody_and_says_so(tiny_checkpoint: Path) -> None:
    host = InProcessHost(EngineSettings(torch_threads=1))
    versions = Versions(host)
    await versions.load(tiny_checkpoint)
    under_way = [asyncio.create_task(versions.generate(opening(seed), LONG)) for seed in range(3)]
    await versions.generate(opening(5), GREEDY)
    engine = versions._current().engine
    engine._policy.model.base_model.language_model.norm = None  # type: ignore[attr-defined]  # as a bug would
    for task in under_way:
        with pytest.raises(TypeError):
            await task
    with pytest.raises(RuntimeError, match="has failed"):
        await versions.generate(opening(), GREEDY)
    assert versions.failed.done()
    await versions.close()


async def test_a_closed_engine_answers_no_more(tiny_checkpoint: Path) -> None:
    engine = await InProcessHost(EngineSettings(torch_threads=1)).open(tiny_checkpoint, "")
    await engine.close()
    with pytest.raises(Transient, match="closed"):
        await engine.generate(opening(), GREEDY)
