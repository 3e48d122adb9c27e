"""One step of RL on a batch of rollouts: forward, weights, backward, update. Knows no bus.

On several ranks each learns from its share of the batch; together they make the update that one would make of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft.helpers import rescale_adapter_scale
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from services.trainer import adapters, parallel, publishing
from services.trainer.batching import Batch, Example, PixelCodec, collate
from services.trainer.loop import weighted_logits
from services.trainer.losses import Clipping, policy_weights, token_log_probabilities, weighted_loss
from services.trainer.optimizer import make_optimizers
from services.trainer.parallel import World
from services.trainer.settings import RlSettings
from services.vlm.render import Renderer

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Rollout:
    """`tail_advantage`: of the tokens after the verdict; None: as of the others."""

    example: Example
    advantage: float
    tail_advantage: float | None = None

    def advantages(self) -> npt.NDArray[np.float32]:
        """Of each weighted token, times what its kind counts."""
        weighted = np.flatnonzero(self.example.weights[1:]) + 1
        placed = np.full(len(weighted), self.advantage, np.float32)
        if self.tail_advantage is not None and self.example.after_verdict is not None:
            placed[self.example.after_verdict[weighted]] = self.tail_advantage
        return placed if self.example.emphasis is None else placed * self.example.emphasis[weighted]


@dataclass(frozen=True)
class Share:
    """Of one update: a rank's micro-batches, as many as every other rank has. `tokens`: weighted ones of all ranks."""

    micro_batches: Sequence[Sequence[Rollout]]
    tokens: int


class Scorer(nn.Module):
    """Batch → logits [k, vocabulary] of its weighted tokens, in one forward, as FSDP needs it. `autocast`: the type to
    compute in; None: that of the weights.
    """

    def __init__(self, model: Any, autocast: torch.dtype | None) -> None:
        super().__init__()
        self.model, self._autocast = model, autocast

    def forward(self, batch: Batch) -> Tensor:
        device = batch.targets.device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return weighted_logits(self.model, batch)


@dataclass
class _Sums:
    """Over the tokens of a step."""

    tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    worst_mismatch: float = 0.0

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.sum())

    def metrics(self, world: World) -> dict[str, float]:
        """Of all ranks; each must call it."""
        names = sorted(self.totals)
        totals = world.total([self.totals[name] for name in names])
        return {
            **{f"policy/{name}": total / self.tokens for name, total in zip(names, totals, strict=True)},
            "policy/mismatch_max": world.greatest(self.worst_mismatch),
            "policy/tokens": float(self.tokens),
        }


class Learner:
    """`policy` is trained in place; `reference` (for KL) is the policy that the run began with, frozen. None: the same
    without its adapters, if there is a KL. Methods must be called on all ranks of the world alike.
    """

    def __init__(
        self, settings: RlSettings, policy: Scorer, reference: Scorer | None, renderer: Renderer, world: World
    ) -> None:
        self.settings, self.policy, self.reference, self.world = settings, policy, reference, world
        self.codec = PixelCodec(renderer.processor.image_processor)
        # Padding is never looked at and never weighted: any id does.
        self.padding_id, self.image_token_id = renderer.end_of_turn_id, renderer.image_token_id
        self.clipping = Clipping(settings.clip_low, settings.clip_high, settings.importance_cap)
        self.parameters = [p for p in policy.parameters() if p.requires_grad]
        self.optimizers = make_optimizers([policy], settings.muon_lr, settings.adam_lr)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.updates = 0

    def step(self, rollouts: Sequence[Rollout], progress: float) -> dict[str, float]:
        """Learns from the batch by `minibatches` updates. `progress`: of the run, 0 to 1. Returns metrics, means over
        the tokens that the policy chose. For one rank. Raises FloatingPointError: a gradient is not finite.
        """
        return self.learn(self.shares(rollouts, 1)[0], progress)

    def shares(self, rollouts: Sequence[Rollout], ranks: int) -> list[list[Share]]:
        """For each rank its share of each update of a step."""
        count, size = self.settings.minibatches, self.settings.micro_batch
        updates = [deal(rollouts[first::count], ranks, size) for first in range(count)]
        return [[update[rank] for update in updates] for rank in range(ranks)]

    def learn(self, shares: Sequence[Share], progress: float) -> dict[str, float]:
        """As `step`, from this rank's shares. The metrics are those of all ranks."""
        minibatches = [[self._collated(rollouts) for rollouts in share.micro_batches] for share in shares]
        # With one update the policy at the start of the batch is the current one.
        proximal = (
            None
            if len(shares) == 1
            else [[self._frozen(self.policy, self._placed(b)) for b, _ in batches] for batches in minibatches]
        )
        sums = _Sums()
        norms = [
            self._update(batches, None if proximal is None else proximal[number], sums, share.tokens, progress)
            for number, (share, batches) in enumerate(zip(shares, minibatches, strict=True))
        ]
        return {**sums.metrics(self.world), "policy/gradient_norm": sum(norms) / len(norms)}

    def state(self) -> dict[str, Any]:
        """Whole tensors on the CPU, on rank 0; of the weights only those that are trained."""
        return {**parallel.trained_state(self.policy.model, self.optimizers), "updates": self.updates}

    def restore(self, state: dict[str, Any]) -> None:
        """Puts it in place in a fresh learner. Rank 0's tensors count, the others need not have any."""
        parallel.restore_trained(self.policy.model, self.optimizers, state)
        self.updates = state["updates"]

    def save(self, source: Path, out: Path) -> None:
        """A checkpoint folder without a card, by rank 0, adapters merged; in the type that the learner computes in, so
        that the policy's log-probabilities are its own.
        """
        weights = parallel.weights_of(self.policy.model)
        if self.world.rank == 0:
            dtype = _DTYPES[self.settings.dtype]
            publishing.save(_bare(self.policy.model, adapters.merged(weights), dtype), source, out, dtype)

    def _collated(self, rollouts: Sequence[Rollout]) -> tuple[Batch, Tensor]:
        """A micro-batch with the advantage of each weighted token."""
        batch = collate([r.example for r in rollouts], self.codec, self.padding_id, self.image_token_id)
        return batch, torch.from_numpy(np.concatenate([rollout.advantages() for rollout in rollouts]))

    def _placed(self, batch: Batch) -> Batch:
        """On the rank's device, only while it is used: pixels take most of the memory."""
        device = self.world.device
        return replace(
            batch,
            inputs={name: value.to(device) for name, value in batch.inputs.items()},
            positions=batch.positions.to(device),
            targets=batch.targets.to(device),
            behaviour=batch.behaviour.to(device),
        )

    def _update(
        self,
        batches: Sequence[tuple[Batch, Tensor]],
        proximal: Sequence[Tensor] | None,
        sums: _Sums,
        tokens: int,
        progress: float,
    ) -> float:
        """One step of the optimizers; the norm of its gradient."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for number, (batch, advantages) in enumerate(batches):
            near = None if proximal is None else proximal[number]
            placed = self._placed(batch)
            self._loss(placed, advantages.to(self.world.device), near, sums, tokens).backward()  # type: ignore[no-untyped-call]
        sums.tokens += tokens
        norm = parallel.clip(self.parameters, self.settings.clip_norm)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} at update {self.updates}")
        self._set_rates(progress)
        for optimizer in self.optimizers:
            optimizer.step()
        self.updates += 1
        return norm

    def _loss(self, batch: Batch, advantages: Tensor, proximal: Tensor | None, sums: _Sums, tokens: int) -> Tensor:
        reference = self._reference(batch)
        logits = self.policy(batch)
        spoken = token_log_probabilities(logits, batch.targets)
        current = spoken.detach()
        found = policy_weights(
            current,
            current if proximal is None else proximal,
            batch.behaviour,
            advantages,
            self.clipping,
            reference,
            self.settings.kl,
        )
        mismatch = (current - batch.behaviour).abs()
        sums.worst_mismatch = max([sums.worst_mismatch, *mismatch.tolist()])
        sums.add(
            entropy=_entropy(logits.detach()),
            mismatch_mean=mismatch,
            clip_share=found.clipped,
            truncated_share=found.truncated,
        )
        if reference is not None:
            distance = reference - current
            sums.add(kl=distance.exp() - distance - 1)
        return weighted_loss(spoken, found.weights, tokens)

    def _reference(self, batch: Batch) -> Tensor | None:
        if not self.settings.kl:
            return None
        if self.reference is not None:
            return self._frozen(self.reference, batch)
        with rescale_adapter_scale(self.policy, 0.0):
            return self._frozen(self.policy, batch)

    def _frozen(self, scorer: Scorer, batch: Batch) -> Tensor:
        with torch.no_grad():
            return token_log_probabilities(scorer(batch), batch.targets)

    def _set_rates(self, progress: float) -> None:
        settings = self.settings
        factor = min(1.0, (self.updates + 1) / max(1, settings.warmup_updates))
        factor *= 1 - progress * (1 - settings.final_rate)
        groups = (group for optimizer in self.optimizers for group in optimizer.param_groups)
        for rate, group in zip(self.rates, groups, strict=True):
            group["lr"] = rate * factor


def _entropy(logits: Tensor) -> Tensor:
    """[n] of logits [n, vocabulary], in nats."""
    logs = torch.log_softmax(logits.float(), dim=-1)
    return -(logs.exp() * logs).sum(-1)


def make_learner(settings: RlSettings, renderer: Renderer, world: World) -> Learner:
    """Of the settings' base; the same on every rank. Raises ValueError: the settings are not for so many ranks."""
    if world.size > 1 and settings.muon_lr > 0:
        raise ValueError(f"muon_lr: Muon needs whole matrices, which {world.size} ranks do not hold; use 0 (AdamW)")
    torch.manual_seed(settings.seed)
    policy = _scorer(settings, world, trained=True)
    reference = _scorer(settings, world, trained=False) if settings.kl and not settings.lora_rank else None
    return Learner(settings, policy, reference, renderer, world)


def _scorer(settings: RlSettings, world: World, *, trained: bool) -> Scorer:
    model = AutoModelForImageTextToText.from_pretrained(settings.base, dtype=torch.float32, local_files_only=True)
    model.train(trained)
    if not trained:
        model.requires_grad_(False)
    elif settings.lora_rank:
        adapters.adapt(model, settings.lora_rank)
    else:
        model.model.visual.requires_grad_(not settings.freeze_vision)
    if trained and settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.to(world.device)
    dtype = _DTYPES[settings.dtype]
    if world.mesh is None:
        return Scorer(model, None if dtype == torch.float32 else dtype)
    scorer = Scorer(model, None)
    parallel.shard(scorer, [*model.model.language_model.layers, *model.model.visual.blocks], world, dtype)
    return scorer


def deal(rollouts: Sequence[Rollout], ranks: int, micro_batch: int) -> list[Share]:
    """The share of each rank in an update by `rollouts`: sorted by length, dealt out like cards. Ranks wait for each
    other in every forward, and so their n-th micro-batches are of about one length.

    A rank whose share is too small for as many forwards as the others do makes up for it by a copy of the shortest
    rollout that weighs nothing.
    """
    ordered = sorted(rollouts, key=lambda rollout: len(rollout.example.ids))
    tokens = sum(int(np.count_nonzero(rollout.example.weights[1:])) for rollout in rollouts)
    dealt = [_chunks(ordered[rank::ranks], micro_batch) for rank in range(ranks)]
    forwards = len(dealt[0])
    return [Share([*own, *([_idle(ordered[0])] for _ in range(len(own), forwards))], tokens) for own in dealt]


def _chunks(rollouts: Sequence[Rollout], size: int) -> list[Sequence[Rollout]]:
    return [rollouts[first : first + size] for first in range(0, len(rollouts), size)]


def _idle(rollout: Rollout) -> Rollout:
    return replace(rollout, example=replace(rollout.example, weights=np.zeros_like(rollout.example.weights)))


def _bare(model: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A plain model of `model`'s class that holds `weights`, to be saved."""
    with torch.device("meta"):
        bare = type(model)(model.config)
    bare.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    bare.tie_weights()
    bare.generation_config = model.generation_config
    return bare
