"""One step of RL on a batch of rollouts: forward, weights, backward, update. Knows no bus."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.trainer import publishing
from services.trainer.batching import Batch, Example, PixelCodec, collate
from services.trainer.loop import weighted_logits
from services.trainer.losses import Clipping, policy_weights, token_log_probabilities, weighted_loss
from services.trainer.optimizer import make_optimizers
from services.trainer.settings import RlSettings
from services.vlm.render import Renderer


@dataclass(frozen=True)
class Rollout:
    example: Example
    advantage: float


@dataclass
class _Sums:
    """Over the tokens of a step."""

    tokens: int = 0
    totals: dict[str, float] = field(default_factory=dict)
    worst_mismatch: float = 0.0

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.totals[name] = self.totals.get(name, 0.0) + float(value.sum())

    def means(self) -> dict[str, float]:
        return {f"policy/{name}": total / self.tokens for name, total in self.totals.items()}


class Learner:
    """`model` is trained in place; `reference` (for KL) is the policy that the run began with, frozen, or None."""

    def __init__(self, settings: RlSettings, model: Any, reference: Any | None, renderer: Renderer) -> None:
        self.settings, self.model, self.reference = settings, model, reference
        self.codec = PixelCodec(renderer.processor.image_processor)
        # Padding is never looked at and never weighted: any id does.
        self.padding_id, self.image_token_id = renderer.end_of_turn_id, renderer.image_token_id
        self.clipping = Clipping(settings.clip_low, settings.clip_high, settings.importance_cap)
        model.model.visual.requires_grad_(not settings.freeze_vision)
        model.train()
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizers = make_optimizers([model], settings.muon_lr, settings.adam_lr)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.updates = 0

    def step(self, rollouts: Sequence[Rollout], progress: float) -> dict[str, float]:
        """Learns from the batch by `minibatches` updates. `progress`: of the run, 0 to 1. Returns metrics, means over
        the tokens that the policy chose. Raises FloatingPointError: a gradient is not finite.
        """
        count = self.settings.minibatches
        minibatches = [self._collated(rollouts[first::count]) for first in range(count)]
        # With one update the policy at the start of the batch is the current one.
        proximal = (
            None if count == 1 else [[self._frozen(self.model, b) for b, _ in batches] for batches in minibatches]
        )
        sums = _Sums()
        norms = [
            self._update(batches, None if proximal is None else proximal[number], sums, progress)
            for number, batches in enumerate(minibatches)
        ]
        means = sums.means()
        return {
            **means,
            "policy/mismatch_max": sums.worst_mismatch,
            "policy/gradient_norm": sum(norms) / len(norms),
            "policy/tokens": float(sums.tokens),
        }

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "updates": self.updates,
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.updates = state["updates"]

    def save(self, source: Path, out: Path) -> None:
        """A checkpoint folder without a card; float32, so that the policy's log-probabilities are the learner's."""
        publishing.save(self.model, source, out, torch.float32)

    def _collated(self, rollouts: Sequence[Rollout]) -> list[tuple[Batch, Tensor]]:
        """Micro-batches with the advantage of each weighted token; those of about one length together."""
        ordered = sorted(rollouts, key=lambda rollout: len(rollout.example.ids))
        size = self.settings.micro_batch
        made = []
        for first in range(0, len(ordered), size):
            chunk = ordered[first : first + size]
            batch = collate([r.example for r in chunk], self.codec, self.padding_id, self.image_token_id)
            made.append((batch, torch.tensor([r.advantage for r in chunk])[batch.rows]))
        return made

    def _update(
        self, batches: Sequence[tuple[Batch, Tensor]], proximal: Sequence[Tensor] | None, sums: _Sums, progress: float
    ) -> float:
        """One step of the optimizers; the norm of its gradient."""
        tokens = sum(len(batch.targets) for batch, _ in batches)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for number, (batch, advantages) in enumerate(batches):
            near = None if proximal is None else proximal[number]
            self._loss(batch, advantages, near, sums, tokens).backward()  # type: ignore[no-untyped-call]
        sums.tokens += tokens
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip_norm))
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm} at update {self.updates}")
        self._set_rates(progress)
        for optimizer in self.optimizers:
            optimizer.step()
        self.updates += 1
        return norm

    def _loss(self, batch: Batch, advantages: Tensor, proximal: Tensor | None, sums: _Sums, tokens: int) -> Tensor:
        logits = weighted_logits(self.model, batch)
        spoken = token_log_probabilities(logits, batch.targets)
        current = spoken.detach()
        reference = None if self.reference is None else self._frozen(self.reference, batch)
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
        sums.worst_mismatch = max(sums.worst_mismatch, float(mismatch.max()))
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

    def _frozen(self, model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            return token_log_probabilities(weighted_logits(model, batch), batch.targets)

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
