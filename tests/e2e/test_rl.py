"""RL through real processes: as a user runs it, and while each of its parts is killed in the middle of a run.

What a run has learnt is checked from what it leaves: its checkpoint names the groups of each step, the topics hold
them, and learning from these once more, in the test, gives the same parameters.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import sys
import time
from collections.abc import AsyncIterator
from itertools import chain, groupby
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from PIL import Image
from safetensors.torch import load_file

from services.chassis.bus import Bus, make_bus
from services.chassis.images import ImageStore
from services.chassis.settings import BusSettings
from services.trainer.encoding import RolloutEncoder
from services.trainer.groups import Group
from services.trainer.learner import make_learner
from services.trainer.parallel import World
from services.trainer.rollouts import past_groups
from services.trainer.settings import RlSettings
from services.vlm.checkpoint import load, sha256_of
from services.vlm.render import Renderer
from tests.e2e.rl_stack import (
    RlStack,
    Topics,
    command,
    last_step,
    metrics_of,
    read_topics,
    rl_stack,
    trained_groups,
    until,
)
from tests.harness.kafka import kafka
from tests.harness.milvus import milvus

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

KAFKA, TRITON = pytest.mark.kafka, pytest.mark.triton
STEPS = 6
# Steps for which a batch may be there or in training at the kill; the next one is asked for after it.
AHEAD = 2
METRICS = {
    *(f"policy/{name}" for name in ("entropy", "mismatch_mean", "mismatch_max", "clip_share", "truncated_share")),
    *("policy/gradient_norm", "policy/tokens", "reward/total", "accuracy/sampled"),
    *(f"reward/{name}" for name in ("verdict", "format", "crop", "box", "type", "tools")),
    *("tools/calls", "tools/crop_rate", "tools/query_rate", "format/malformed", "format/limit"),
    *("speed/step_s", "speed/trajectories_per_s", "speed/tokens_per_s", "idle/trainer", "idle/policy"),
    *("staleness/mean", "staleness/worst", "groups/waiting"),
    *(f"groups/dropped_{name}" for name in ("stale", "equal", "late")),
}


@pytest_asyncio.fixture(loop_scope="module", params=["embedded", pytest.param("kafka", marks=[KAFKA, TRITON])])
async def place(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[dict[str, str]]:
    """What tells a command where things are; on Kafka with Milvus and Redis as servers and the model in Triton."""
    own = {"OMP_NUM_THREADS": "1", "TORCH_THREADS": "1", "DATA_DIR": str(tmp_path / "data")}
    if request.param == "embedded":
        yield own
        return
    with milvus() as uri, kafka() as broker:
        servers = {"REDIS_URL": request.getfixturevalue("redis_url"), "TRITON_URL": request.getfixturevalue("triton")}
        yield {
            **own, **servers, "ENGINE_HOST": "triton", "MILVUS_URI": uri, "KAFKA_BOOTSTRAP_SERVERS": broker.address,
        }  # fmt: skip


async def test_a_run_as_a_user_starts_it(place: dict[str, str], tmp_path: Path) -> None:
    """On the embedded bus synchronously, on Kafka with a batch ahead."""
    servers, out = place.get("KAFKA_BOOTSTRAP_SERVERS", ""), tmp_path / "run"
    max_staleness = 1 if servers else 0
    agentiad = Path(sys.executable).with_name("agentiad")
    argv = command(agentiad, "train", "rl", out=out, steps=3, max_staleness=max_staleness)
    with (tmp_path / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(*argv, env={**os.environ, **place}, stdout=log, stderr=log)
        status = await process.wait()
    assert status == 0, (tmp_path / "log").read_text()[-3000:]

    rows = metrics_of(out)
    assert [row.pop("step") for row in rows] == [1, 2, 3]
    for row in rows:
        assert set(row) >= METRICS
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in row.values()), row
        assert row["staleness/worst"] <= max_staleness
    with Image.open(out / "curves.png") as curves:
        curves.verify()
    bus = make_bus(BusSettings(data_dir=tmp_path / "data", kafka_bootstrap_servers=servers))
    try:
        found = await read_topics(bus, out)
        check_versions(out, found, 3)
        check_ages(out, found, max_staleness)
        await check_learning(bus, out, found, ImageStore([], str(tmp_path / "data" / "images")))
    finally:
        await bus.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RlStack]:
    """Of all tests with the same host of the model."""
    async with rl_stack(tmp_path_factory.mktemp("stack"), triton=request.param == "triton") as made:
        yield made


@KAFKA
@pytest.mark.parametrize("stack", ["in process"], indirect=True)
@pytest.mark.parametrize("victim", ["agent", "reward", "policy", "trainer", "broker"])
async def test_a_run_outlives_each_of_its_parts(stack: RlStack, victim: str) -> None:
    await check_outlives(stack, victim)


@KAFKA
@TRITON
@pytest.mark.parametrize("stack", ["triton"], indirect=True)
async def test_a_run_outlives_triton(stack: RlStack) -> None:
    await check_outlives(stack, "triton")


async def check_outlives(stack: RlStack, victim: str) -> None:
    out = stack.folder / victim
    trainer = await stack.start_trainer(out, STEPS)
    await until(lambda: last_step(out) >= 2, trainer)
    starts = {name: part.starts for name, part in stack.parts.items()}

    if victim == "agent":
        await until(lambda: stack.unfinished(out) > 0, trainer)
    step, began = last_step(out), time.monotonic()
    await stack.kill(victim)
    if victim == "agent":
        assert stack.unfinished(out), "the agent was not in the middle of an episode"
    assert step + AHEAD < STEPS, "nothing was left to be asked for after the kill"
    await until(lambda: last_step(out) > step + AHEAD, trainer)
    print(f"{victim}: {1 + AHEAD} more steps took {time.monotonic() - began:.1f} s from the kill on")
    await until(trainer.ended_well.done, trainer)

    again = {name: part.starts - starts[name] for name, part in stack.parts.items()}
    assert again == {name: int(name == victim) for name in again}
    assert [row["step"] for row in metrics_of(out)] == list(range(1, STEPS + 1))
    found = await read_topics(stack.bus, out)
    check_versions(out, found, STEPS)
    check_ages(out, found, 1)
    await check_learning(stack.bus, out, found, ImageStore([], stack.environment["IMAGE_STORE"]))


def check_versions(out: Path, found: Topics, steps: int) -> None:
    """One after each step, in their order, of which a resumed run publishes its last one again; all can be loaded."""
    names = [version.version for version in found.versions]
    assert [name for name, _ in groupby(names)] == sorted(set(names))
    assert [int(name.split("-")[-2]) for name in sorted(set(names))] == list(range(steps + 1))
    for version in found.versions:
        folder = out / "versions" / version.version
        assert version.checkpoint_uri == folder.resolve().as_uri()
        assert version.sha256 == sha256_of(folder)
    assert load(out / "versions" / names[-1]).card.version == names[-1]


def check_ages(out: Path, found: Topics, max_staleness: int) -> None:
    """At its step no group holds a token of a version that had been replaced more than `max_staleness` times."""
    order = sorted({version.version for version in found.versions})
    for step, names in enumerate(trained_groups(out)):
        allowed = set(order[max(0, step - max_staleness) : step + 1])
        for name in names:
            members = [found.scored[f"{name}/{member}"][0] for member in range(4)]
            turns = [turn for scored in members for turn in scored.completed.trajectory.turns]
            assert {turn.generation.policy_version for turn in turns if turn.HasField("generation")} <= allowed


async def check_learning(bus: Bus, out: Path, found: Topics, images: ImageStore) -> None:
    """No group was trained twice and none half: the newest version is what these whole groups teach, each once."""
    assert found.versions[0].sha256 != found.versions[-1].sha256
    assert {len(copies) for copies in found.trajectories.values()} == {1}
    assert {len(copies) for copies in found.scored.values()} == {1}
    trained = trained_groups(out)
    names = list(chain.from_iterable(trained))
    assert len(set(names)) == len(names) == 2 * len(trained)
    said, _, _ = (out / "work" / "settings").read_text().partition("\nreplay:")
    settings = RlSettings.model_validate({"out": out, **json.loads(said)})
    past = await past_groups(bus, (out / "work" / "run").read_text(), settings)
    groups = {group.group_id: group for group in past}
    assert all(len(groups[name].members) == settings.group_size for name in names)
    learnt = await asyncio.to_thread(learn, settings, [[groups[name] for name in step] for step in trained], images)
    newest = load_file(out / "versions" / found.versions[-1].version / "model.safetensors")
    assert all(torch.equal(newest[name], learnt[name]) for name in newest)


def learn(settings: RlSettings, steps: list[list[Group]], images: ImageStore) -> dict[str, torch.Tensor]:
    """The parameters after these steps, by a learner that begins with the run's base."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the run: sums depend on it
    renderer = Renderer.from_checkpoint(settings.base)
    learner = make_learner(settings, renderer, World(torch.device("cpu")))
    encoder = RolloutEncoder(renderer, images)
    for number, groups in enumerate(steps):
        learner.step(encoder.encode(groups), number / settings.steps)
    torch.set_num_threads(threads)
    parameters: dict[str, torch.Tensor] = learner.state()["model"]
    return parameters
