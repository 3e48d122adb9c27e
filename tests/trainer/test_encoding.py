"""The learner sees what the policy saw: ids, pixels, and log-probabilities of exactly the tokens that it chose."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
import torch

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.events_pb2 import RolloutRequested
from services.agent import episode, protocol
from services.agent.runner import Runner
from services.chassis.errors import NotFound
from services.chassis.images import ImageStore
from services.cli.stack import Stack, embedded
from services.data import procedural
from services.policy.settings import PolicySettings
from services.policy.transformers_engine import TransformersEngine
from services.trainer.batching import Example, PixelCodec, collate
from services.trainer.encoding import RolloutEncoder, shown
from services.trainer.groups import Group
from services.trainer.learner import Rollout
from services.trainer.loop import weighted_logits
from services.trainer.losses import token_log_probabilities
from services.vlm.checkpoint import LoadedPolicy, load
from tests.policy.checkpoints import Architecture, make_tiny_checkpoint
from tests.policy.conversations import make_picture
from tests.trainer.make_rollouts import make_request, make_scored

pytestmark = pytest.mark.asyncio(loop_scope="module")

POCKET = Path(PolicySettings.model_fields["checkpoint"].default)
TINY: tuple[Architecture, ...] = ("qwen3_vl", "qwen2_5_vl")
CLOSE = 1e-3
# Temperature and limits: as in training; hot, so that replies go wrong; cut off; verdicts forced at the turn limit.
WAYS: tuple[tuple[float, dict[str, int]], ...] = (
    (1.0, {}),
    (2.0, {}),
    (1.0, {"max_new_tokens": 9}),
    (1.0, {"max_turns": 1}),
    (1.0, {"max_turns": 2, "max_tool_calls": 1, "max_new_tokens": 40}),
)


@dataclass(frozen=True)
class Site:
    """A policy and episodes that its engine sampled, with their pictures."""

    policy: LoadedPolicy
    store: ImageStore
    trajectories: list[pb.Trajectory]

    @property
    def encoder(self) -> RolloutEncoder:
        return RolloutEncoder(self.policy.renderer, self.store)

    @property
    def codec(self) -> PixelCodec:
        return PixelCodec(self.policy.renderer.processor.image_processor)

    def examples(self) -> list[Example]:
        encoder = self.encoder
        return [encoder.rollout(trajectory, 1.0).example for trajectory in self.trajectories]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["pocket", *TINY])
async def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    if request.param == "pocket":
        async with embedded(folder, [], None, library=folder) as stack:
            yield Site(load(POCKET), stack.images, await play_pocket(stack))
        return
    policy = load(make_tiny_checkpoint(folder / "checkpoint", request.param))
    store = ImageStore([], str(folder / "images"))
    engine = TransformersEngine(policy, store.load)
    trajectories = await asyncio.gather(*(play_tiny(engine, store, seed) for seed in range(8)))
    await engine.close()
    yield Site(load(folder / "checkpoint"), store, trajectories)


async def play_pocket(stack: Stack) -> list[pb.Trajectory]:
    """Parts of every category in every way, by the agent's own runner on the embedded stack."""
    runner = Runner(stack.policy, stack.zoom, stack.retrieval)
    parts = list(procedural.make_set(procedural.CATEGORIES, 2, 5, range(1_000_000, 1_000_002)))

    # One after another: the embedded Milvus does not take insertions side by side.
    asked = [await make_request(stack, part, part.category, way) for part in parts for way in range(len(WAYS))]

    async def play(asked: RolloutRequested) -> pb.Trajectory:
        temperature, limits = WAYS[asked.member]
        asked.sampling.temperature = temperature
        asked.limits.MergeFrom(pb.Limits(**limits))
        trajectory = await runner.begin(asked.event_id, asked.task, asked.limits, asked.sampling)
        await runner.run(trajectory, no_record, probe=True)
        return trajectory

    return await asyncio.gather(*map(play, asked))


async def no_record(trajectory: pb.Trajectory) -> None:
    assert trajectory.turns


async def play_tiny(engine: TransformersEngine, store: ImageStore, seed: int) -> pb.Trajectory:
    """A random policy never calls a tool: after each of its turns comes a view that it did not ask for."""
    size = (80 + 16 * seed, 64)
    limits = pb.Limits(max_turns=2, max_tool_calls=2, max_new_tokens=5 if seed % 2 else 60)
    task = pb.Task(image=pb.Image(reference=store.put(make_picture(seed, size))), category="bottle")
    sampling = pb.Sampling(temperature=1, seed=seed)
    trajectory = episode.begin(str(seed), task, limits, sampling, engine.card)
    while isinstance(step := episode.next_step(trajectory), episode.GenerateStep):
        generation = await engine.generate(step.messages, step.sampling)
        episode.add_generation(trajectory, generation, timedelta())
        if not trajectory.stop_reason:
            del trajectory.turns[-1]
            seen = pb.Observation(image=store.put(make_picture(100 + seed, (64, 96))), region=episode.WHOLE)
            if len(trajectory.turns) > 3:
                seen.exemplar.CopyFrom(task.image.reference)
                seen.registered = True
            episode.add_observation(trajectory, seen, timedelta())
    return trajectory


def said(trajectory: pb.Trajectory) -> list[pb.Generation]:
    return [turn.generation for turn in trajectory.turns if turn.HasField("generation")]


def answers(trajectory: pb.Trajectory) -> list[pb.Observation]:
    return [turn.observation for turn in trajectory.turns if turn.observation.HasField("image")]


async def test_the_episodes_hold_everything_that_can_go_wrong(site: Site) -> None:
    """What the other tests stand on."""
    finishes = {generation.finish_reason for each in site.trajectories for generation in said(each)}
    assert finishes == {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
    assert any(seen.HasField("exemplar") for each in site.trajectories for seen in answers(each))
    assert any(not seen.HasField("exemplar") for each in site.trajectories for seen in answers(each))
    assert any(len(said(each)) >= 3 and len(answers(each)) >= 2 for each in site.trajectories)
    forced = [each for each in site.trajectories if len(said(each)) > each.limits.max_turns]
    assert forced
    assert all(each.turns[-1].message.segments[0].text == protocol.FORCED_ANSWER for each in forced)
    replies = [protocol.parse(generation.text) for each in site.trajectories for generation in said(each)[:-1]]
    assert any(isinstance(reply, protocol.Malformed) for reply in replies)


async def test_log_probabilities_are_the_engines(site: Site) -> None:
    encoder = site.encoder
    site.policy.model.train()  # as the learner has it
    worst = 0.0
    for first in range(0, len(site.trajectories), 4):
        chunk = site.trajectories[first : first + 4]
        examples = [encoder.rollout(trajectory, 1.0).example for trajectory in chunk]
        batch = collate(examples, site.codec, 0, site.policy.renderer.image_token_id)
        with torch.no_grad():
            found = token_log_probabilities(weighted_logits(site.policy.model, batch), batch.targets)
        for row, trajectory in enumerate(chunk):
            chosen = [token for generation in said(trajectory) for token in generation.token_ids]
            behaviour = [value for generation in said(trajectory) for value in generation.log_probabilities]
            mine = batch.rows == row
            assert batch.targets[mine].tolist() == chosen
            assert batch.behaviour[mine].tolist() == behaviour
            worst = max(worst, float((found[mine] - torch.tensor(behaviour)).abs().max()))
    assert worst <= CLOSE


async def test_weight_stands_on_exactly_what_the_policy_chose(site: Site) -> None:
    """By the places that the engine itself counted: its prompt's length, and what it added to it."""
    for trajectory, example in zip(site.trajectories, site.examples(), strict=True):
        weights = np.zeros(len(example.ids), np.float32)
        behaviour = np.full(len(example.ids), np.nan, np.float32)
        for generation in said(trajectory):
            place = slice(generation.prompt_tokens, generation.prompt_tokens + len(generation.token_ids))
            assert example.ids[place].tolist() == list(generation.token_ids)
            weights[place] = 1
            behaviour[place] = generation.log_probabilities
        np.testing.assert_array_equal(example.weights, weights)
        assert example.behaviour is not None
        np.testing.assert_array_equal(example.behaviour, behaviour)
        assert not example.weights[example.ids == site.policy.renderer.image_token_id].any()


async def test_a_token_that_the_caller_forced_has_no_weight(site: Site) -> None:
    trajectory = pb.Trajectory()
    trajectory.CopyFrom(site.trajectories[0])
    said(trajectory)[0].loss_mask[0] = False
    before, after = (site.encoder.rollout(each, 1.0).example for each in (site.trajectories[0], trajectory))
    assert np.flatnonzero(before.weights != after.weights).tolist() == [said(trajectory)[0].prompt_tokens]


async def test_pixels_are_those_of_every_image_in_its_order(site: Site) -> None:
    encoder = site.encoder
    for trajectory in site.trajectories[:8]:
        example = encoder.rollout(trajectory, 1.0).example
        pixels = site.policy.renderer.pixels([site.store.load(image) for image in shown(trajectory)])
        assert example.grids.tolist() == pixels["image_grid_thw"].tolist()
        torch.testing.assert_close(site.codec.unpack(example.patches), pixels["pixel_values"], atol=1e-5, rtol=0)


async def test_each_member_has_its_own_advantage(site: Site) -> None:
    groups = [
        Group(name, 0, [make_scored(name, i, trajectory=site.trajectories[first + i]) for i in range(2)], advantages)
        for name, first, advantages in (("one", 0, [-1.0, 1.0]), ("two", 2, [0.5, -0.5]))
    ]
    rollouts = site.encoder.encode(groups)
    assert [rollout.advantage for rollout in rollouts] == [-1.0, 1.0, 0.5, -0.5]
    for rollout, trajectory in zip(rollouts, site.trajectories[:4], strict=True):
        chosen = [token for generation in said(trajectory) for token in generation.token_ids]
        assert rollout.example.ids[rollout.example.weights > 0].tolist() == chosen


async def test_a_picture_that_is_gone_is_said(site: Site) -> None:
    trajectory = pb.Trajectory()
    trajectory.CopyFrom(site.trajectories[0])
    reference = next(shown(trajectory)).reference
    reference.uri, reference.sha256 = reference.uri.replace(reference.sha256, "0" * 64), "0" * 64
    with pytest.raises(NotFound, match="0" * 64):
        site.encoder.rollout(trajectory, 1.0)


async def test_only_what_follows_the_verdict_that_counts_is_marked(site: Site) -> None:
    """Marked tokens spell what comes after `true` or `false` in the last reply; nothing else is marked."""
    decode = site.policy.renderer.decode
    seen = 0
    for trajectory, example in zip(site.trajectories, site.examples(), strict=True):
        assert example.after_verdict is not None
        marked = decode(example.ids[example.after_verdict].tolist())
        last = trajectory.turns[-1].generation
        text = "".join(segment.text for segment in trajectory.turns[-1].message.segments[:-1]) + decode(last.token_ids)
        found = re.search(r'"anomaly_present"\s*:\s*(true|false)', text)
        assert marked == (text[found.end() :] if found else "")
        assert (example.weights[example.after_verdict] == 1).all()
        seen += bool(marked)
    assert seen or site.policy.card.base_model != "pocket"


async def test_the_tail_has_an_advantage_of_its_own(site: Site) -> None:
    for example in site.examples():
        assert example.after_verdict is not None
        weighted = example.after_verdict[1:][example.weights[1:] > 0]
        placed = Rollout(example, -1.0, 0.25).advantages()
        assert placed.tolist() == [0.25 if tail else -1.0 for tail in weighted]
        assert set(Rollout(example, -1.0).advantages()) == {-1.0}
