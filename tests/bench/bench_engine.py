"""What batching and prefix reuse are worth: episodes a second of the engine alone, as ratios measured side by side.

An episode is what an inspection is: the first view, a crop, an exemplar; each turn brings an image of its own, and the
tools cost nothing here. Three turns, or two (the first view and a crop). Each rate is the median of several rounds that
take turns, so that a busy machine spoils both sides alike.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.agent.protocol import SYSTEM_PROMPT
from services.policy.engine import Engine
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings, PolicySettings
from tests.policy.conversations import assistant, make_reference, system, user

POCKET = Path(PolicySettings().checkpoint)
ROUNDS = 3
EPISODES = 64
SAMPLING = pb.Sampling(temperature=1, max_new_tokens=32)
WORDS = (
    "Image 1: metal_plate.",
    "Image 2: closer, [0.10,0.20,0.30,0.40].",
    "Image 3: normal part, [0.10,0.20,0.30,0.40].",
)


class Pictures:
    """A new picture for every place, so that nothing is reused but what an episode repeats."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._count = folder, 0

    def new(self) -> pb.Image:
        self._count += 1
        return make_reference(self.folder / f"{self._count}.png", self._count, (256, 256))


async def episode(engine: Engine, images: list[pb.Image], seed: int) -> None:
    messages = [system(SYSTEM_PROMPT)]
    for image, words in zip(images, WORDS, strict=False):
        messages.append(user(image, words))
        wish = pb.Sampling(temperature=SAMPLING.temperature, max_new_tokens=SAMPLING.max_new_tokens, seed=seed)
        generation = await engine.generate(messages, wish)
        messages.append(assistant(generation.token_ids))


async def rate(engine: Engine, pictures: Pictures, turns: int, at_once: int, episodes: int) -> float:
    """Episodes a second."""
    work = [[pictures.new() for _ in range(turns)] for _ in range(episodes)]

    async def worker() -> None:
        while work:
            await episode(engine, work.pop(), seed=len(work))

    started = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(at_once)))
    return episodes / (time.perf_counter() - started)


async def compare(sides: dict[str, Callable[[], Awaitable[float]]]) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(ROUNDS + 1):
        for name, measure in sides.items():
            measured = await measure()
            if round_number:  # the first one warms up
                rates[name].append(measured)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    print("\n  " + "   ".join(f"{name}: {value:.2f} episodes/s" for name, value in medians.items()))
    return medians


def with_images_of(side: int, folder: Path) -> Path:
    """Pocket with another size of its views: the same weights, more tokens an image."""
    path = folder / f"pocket-{side}"
    shutil.copytree(POCKET, path)
    file = path / "preprocessor_config.json"
    config = json.loads(file.read_text())
    config["size"] = {"shortest_edge": side * side, "longest_edge": side * side}
    file.write_text(json.dumps(config))
    return path


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("side", "turns"), [(96, 2), (96, 3), (192, 2)])
async def test_prefix_reuse(tmp_path: Path, side: int, turns: int) -> None:
    pictures = Pictures(tmp_path)
    settings = EngineSettings(image_roots=(str(tmp_path),), torch_threads=1)
    checkpoint = with_images_of(side, tmp_path)
    reusing = await InProcessHost(settings).open(checkpoint, "")
    without = await InProcessHost(settings.model_copy(update={"prefix_cache_mib": 0})).open(checkpoint, "")
    rates = await compare(
        {
            "with prefix reuse": lambda: rate(reusing, pictures, turns, 32, EPISODES),
            "without": lambda: rate(without, pictures, turns, 32, EPISODES),
        }
    )
    ratio = rates["with prefix reuse"] / rates["without"]
    print(f"prefix reuse, {side}-pixel views, {turns} turns, 32 at once: {ratio:.2f} (goal 1.3)")
    await reusing.close()
    await without.close()


@pytest.mark.timeout(1800)
async def test_batching(tmp_path: Path) -> None:
    pictures = Pictures(tmp_path)
    engine = await InProcessHost(EngineSettings(image_roots=(str(tmp_path),), torch_threads=1)).open(POCKET, "")
    rates = await compare(
        {
            "1 at once": lambda: rate(engine, pictures, 3, 1, 6),
            "8 at once": lambda: rate(engine, pictures, 3, 8, 32),
            "32 at once": lambda: rate(engine, pictures, 3, 32, EPISODES),
        }
    )
    print(f"8 at once / 1: {rates['8 at once'] / rates['1 at once']:.2f}")
    print(f"32 at once / 1: {rates['32 at once'] / rates['1 at once']:.2f} (goal 5.5)")
    await engine.close()
