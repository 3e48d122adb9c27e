"""The learner on one rank: its micro-batches, its precision, its checkpoint and what it saves."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from services.trainer.learner import Learner, deal, make_learner
from services.vlm.render import Renderer
from tests.policy.checkpoints import Architecture, make_tiny_checkpoint
from tests.trainer.make_learners import ONE, alone, make_lesson, make_rollouts


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {name: make_tiny_checkpoint(folder / name, name) for name in get_args(Architecture)}


@pytest.fixture(scope="module")
def base(bases: dict[str, Path]) -> Path:
    return bases["qwen3_vl"]


@pytest.fixture(scope="module")
def renderer(base: Path) -> Renderer:
    return Renderer.from_checkpoint(base)


def make(base: Path, **changes: object) -> Learner:
    torch.set_num_threads(1)
    return make_learner(make_lesson(base, Path("unused"), **changes).settings, Renderer.from_checkpoint(base), ONE)


def gradients(learner: Learner, count: int = 4) -> dict[str, Tensor]:
    """Of a step, before it is clipped to nothing that would hide a difference of scale."""
    learner.step(make_rollouts(Renderer.from_checkpoint(learner.settings.base), count), 0.0)
    return {name: p.grad.clone() for name, p in learner.policy.named_parameters() if p.grad is not None}


def weights(learner: Learner) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in learner.policy.model.state_dict().items()}


@pytest.mark.parametrize(("count", "ranks", "forwards"), [(7, 2, 2), (5, 2, 2), (1, 3, 1), (12, 3, 2)])
def test_every_rank_gets_as_many_forwards_and_every_rollout_is_learnt_from_once(
    renderer: Renderer, count: int, ranks: int, forwards: int
) -> None:
    rollouts = make_rollouts(renderer, count)
    shares = deal(rollouts, ranks, 2)
    assert [len(share.micro_batches) for share in shares] == [forwards] * ranks
    given = [rollout for share in shares for rollouts in share.micro_batches for rollout in rollouts]
    weighty = [rollout for rollout in given if rollout.example.weights.any()]
    assert sorted(map(id, weighty)) == sorted(map(id, rollouts))
    assert {share.tokens for share in shares} == {sum(int(r.example.weights.sum()) for r in rollouts)}


def test_ranks_compute_rollouts_of_about_one_length_at_a_time(renderer: Renderer) -> None:
    one, other = deal(make_rollouts(renderer, 12), 2, 2)
    spans = [
        [len(rollout.example.ids) for share in (one, other) for rollout in share.micro_batches[number]]
        for number in range(3)
    ]
    assert all(max(near) <= min(far) for near, far in pairwise(spans))


@pytest.mark.parametrize("changes", [{}, {"minibatches": 2}, {"kl": 0.1}], ids=str)
def test_the_size_of_micro_batches_changes_nothing(base: Path, tmp_path: Path, changes: dict[str, object]) -> None:
    small = alone(make_lesson(base, tmp_path / "small", **{**changes, "micro_batch": 1}))
    large = alone(make_lesson(base, tmp_path / "large", **{**changes, "micro_batch": 16}))
    for ours, theirs in zip(small.metrics, large.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, value in small.state["model"].items():
        torch.testing.assert_close(value, large.state["model"][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("freeze_vision", [True, False])
def test_recomputed_activations_give_the_same_gradients(
    bases: dict[str, Path], architecture: str, freeze_vision: bool
) -> None:
    forwards = {True: 0, False: 0}

    def counted(recomputing: bool) -> dict[str, Tensor]:
        changes = {"gradient_checkpointing": recomputing, "freeze_vision": freeze_vision}
        learner = make(bases[architecture], **changes)

        def count(*_: Any) -> None:
            forwards[recomputing] += 1

        learner.policy.model.model.language_model.layers[0].input_layernorm.register_forward_hook(count)
        return gradients(learner)

    plain, recomputed = counted(False), counted(True)
    assert forwards[True] == 2 * forwards[False]
    assert plain.keys() == recomputed.keys()
    assert any("visual" in name for name in plain) is not freeze_vision
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_bfloat16_points_the_same_way(bases: dict[str, Path], architecture: str) -> None:
    exact = gradients(make(bases[architecture]))
    rough = gradients(make(bases[architecture], dtype="bfloat16"))
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())
    one, other = (torch.cat([found[name].flatten() for name in sorted(exact)]) for found in (exact, rough))
    distance = float((one - other).norm() / one.norm())
    # Bfloat16 has 8 bits of a number: each step errs by about 0.4 %, and two of its layers would not hide that.
    assert 1e-3 < distance < 0.1


def test_bfloat16_is_saved_as_it_computes(base: Path, tmp_path: Path) -> None:
    make(base, dtype="bfloat16").save(base, tmp_path / "version")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "version")
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_a_saved_version_is_the_policy_that_was_trained(
    bases: dict[str, Path], architecture: str, tmp_path: Path
) -> None:
    learner = make(bases[architecture])
    gradients(learner)
    learner.save(bases[architecture], tmp_path / "version")
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "version").state_dict()
    trained, before = weights(learner), AutoModelForImageTextToText.from_pretrained(bases[architecture]).state_dict()
    assert saved.keys() == trained.keys() == before.keys()
    assert all(torch.equal(saved[name], value) for name, value in trained.items())
    assert not all(torch.equal(saved[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    "changes", [{}, {"muon_lr": 0.01}, {"freeze_vision": True}, {"lora_rank": 4, "kl": 0.1}], ids=str
)
def test_a_resumed_learner_goes_on_as_if_nothing_had_happened(
    base: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    whole = alone(make_lesson(base, tmp_path / "whole", (4, 3, 4), **changes))
    first = alone(make_lesson(base, tmp_path / "first", (4, 3), **changes))
    torch.save(first.state, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    rest = alone(make_lesson(base, tmp_path / "rest", (4,), state, **changes))
    assert rest.metrics == whole.metrics[2:]
    assert all(torch.equal(value, rest.state["model"][name]) for name, value in whole.state["model"].items())


def test_a_checkpoint_before_the_first_step_changes_nothing(base: Path, renderer: Renderer) -> None:
    disturbed, undisturbed, resumed = make(base), make(base), make(base)
    resumed.restore(disturbed.state())
    for learner in (disturbed, undisturbed, resumed):
        learner.step(make_rollouts(renderer, 3), 0.0)
    for learner in (disturbed, resumed):
        assert all(torch.equal(value, weights(learner)[name]) for name, value in weights(undisturbed).items())


def test_the_divergence_counts_from_where_the_run_began(base: Path, renderer: Renderer) -> None:
    learner = make(base, kl=0.1)
    distances = [learner.step(make_rollouts(renderer, 4), 0.0)["policy/kl"] for _ in range(3)]
    assert distances[0] == 0.0
    assert 0.0 < distances[1] < distances[2]


def test_a_gradient_that_is_no_number_stops_the_run(base: Path, renderer: Renderer) -> None:
    learner = make(base)
    before = weights(learner)
    broken = [replace(rollout, advantage=float("nan")) for rollout in make_rollouts(renderer, 2)]
    with pytest.raises(FloatingPointError, match="nan at update 0"):
        learner.step(broken, 0.0)
    assert all(torch.equal(value, weights(learner)[name]) for name, value in before.items())


def test_muon_is_refused_on_many_ranks(base: Path, renderer: Renderer) -> None:
    settings = make_lesson(base, Path("unused"), muon_lr=0.01).settings
    with pytest.raises(ValueError, match="muon_lr: Muon needs whole matrices, which 2 ranks do not hold"):
        make_learner(settings, renderer, replace(ONE, size=2))
