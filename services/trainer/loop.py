"""The training loop. Killed at any moment, it goes on from its last checkpoint as if nothing had happened."""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.trainer.batching import Batch, Example, PixelCodec, collate
from services.trainer.losses import Coordinates, token_log_probabilities, weighted_loss
from services.trainer.optimizer import make_optimizers
from services.trainer.pretext import PretextHeads
from services.trainer.settings import SftSettings
from services.vlm.pocket import COORDINATES
from services.vlm.render import Renderer

# Examples of about one length share a batch: sorted within windows of this many batches, which stay shuffled.
_WINDOW = 8


class Loop:
    """Pretext steps first, then SFT steps with the pretext beside them. `labels`: kinds of marks; 0: no pretext."""

    def __init__(
        self,
        settings: SftSettings,
        model: Any,
        renderer: Renderer,
        examples: Sequence[Example],
        labels: int,
        work: Path,
    ) -> None:
        self.settings, self.model, self.examples, self.work = settings, model, examples, work
        self.codec = PixelCodec(renderer.processor.image_processor)
        # Padding is never looked at and never weighted: any id does.
        self.padding_id, self.image_token_id = renderer.end_of_turn_id, renderer.image_token_id
        self.merge = int(model.config.vision_config.spatial_merge_size)
        self.coordinates = _coordinates(renderer, model)
        self.vision: nn.Module = model.model.visual
        self.vision.requires_grad_(not settings.freeze_vision)
        self.pretext_steps = 0 if settings.freeze_vision or not labels else settings.pretext_steps
        self.heads = PretextHeads(model.config.text_config.hidden_size, labels) if self.pretext_steps else None
        modules = [model, self.heads] if self.heads else [model]
        self.parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
        self.optimizers = make_optimizers(modules, settings.muon_lr, settings.adam_lr)
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]
        self.sft_steps = max(1, round(len(examples) * settings.epochs / settings.batch))
        self.steps = self.pretext_steps + self.sft_steps
        self.step, self.seconds = 0, 0.0
        self._features: Tensor | None = None
        self.vision.register_forward_hook(self._keep_features)

    def run(self, on_step: Callable[[dict[str, float]], None]) -> None:
        """Trains to the end. `on_step` hears of each step's losses, learning rate and speed."""
        self.model.train()
        saved = time.monotonic()
        started = saved
        for batch in self.batches():
            metrics = self.train_on(batch)
            started, before = time.monotonic(), started
            self.seconds += started - before
            self.step += 1
            on_step({"step": self.step, "seconds": round(self.seconds, 2), **metrics})
            if time.monotonic() - saved > 60 * self.settings.checkpoint_minutes:
                self.save()
                saved = time.monotonic()

    def save(self) -> None:
        """Everything that a resumed run needs; whole or not at all."""
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict() if self.heads else None,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "random": torch.get_rng_state(),
        }
        partial = self.work / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / "state.pt")

    def resume(self) -> bool:
        """Loads the last checkpoint, if there is one."""
        path = self.work / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        if self.heads:
            self.heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        return True

    def train_on(self, batch: Batch) -> dict[str, float]:
        settings, progress = self.settings, self._progress()
        factor = min(1.0, (self.step + 1) / settings.warmup_steps) * (1 - progress)
        if self.step >= self.pretext_steps:
            factor *= min(1.0, (self.step - self.pretext_steps + 1) / settings.warmup_steps)
        for rate, group in zip(self.rates, self._groups(), strict=True):
            group["lr"] = rate * factor
        sigma = settings.sigma_first * (settings.sigma_last / settings.sigma_first) ** progress
        metrics = {"rate": round(factor, 4)}
        loss: Tensor = torch.zeros(())
        if self.step < self.pretext_steps:
            self.vision(batch.inputs["pixel_values"], grid_thw=batch.inputs["image_grid_thw"])
        else:
            loss = self.policy_loss(batch, sigma)
            metrics["loss"] = loss.item()
        if self.heads is not None:
            assert self._features is not None
            grids = batch.inputs["image_grid_thw"]
            pretext = self.heads.loss(self._features, grids, self.merge, batch.marks, self._embeddings(), sigma)
            metrics["pretext"] = pretext.item()
            loss = loss + pretext * (1.0 if self.step < self.pretext_steps else settings.pretext_weight)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}")
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        for optimizer in self.optimizers:
            optimizer.step()
        return metrics

    def policy_loss(self, batch: Batch, sigma: float) -> Tensor:
        logits = weighted_logits(self.model, batch)
        return weighted_loss(token_log_probabilities(logits, batch.targets, self.coordinates, sigma), batch.weights)

    def _embeddings(self) -> Tensor | None:
        if self.coordinates is None:
            return None
        table: Tensor = self.model.get_input_embeddings().weight
        return table[self.coordinates.ids]

    def _progress(self) -> float:
        return max(0, self.step - self.pretext_steps) / self.sft_steps

    def _groups(self) -> Iterator[dict[str, Any]]:
        for optimizer in self.optimizers:
            yield from optimizer.param_groups

    def _keep_features(self, _module: nn.Module, _inputs: object, output: Any) -> None:
        self._features = output.pooler_output

    def batches(self) -> Iterator[Batch]:
        """From the current step on; the order is a function of the seed alone."""
        per_epoch = max(1, len(self.examples) // self.settings.batch)
        made, order = None, []
        for step in range(self.step, self.steps):
            by_length = step >= self.pretext_steps
            epoch, position = divmod(step - self.pretext_steps if by_length else step, per_epoch)
            if made != (by_length, epoch):
                made, order = (by_length, epoch), self._order(by_length, epoch)
            picked = order[position]
            yield collate([self.examples[i] for i in picked], self.codec, self.padding_id, self.image_token_id)

    def _order(self, by_length: bool, epoch: int) -> list[list[int]]:
        """`by_length`: to save padding. The pretext pads nothing, and learns sooner from mixed batches."""
        rng = np.random.default_rng([self.settings.seed, by_length, epoch])
        shuffled = rng.permutation(len(self.examples)).tolist()
        size = self.settings.batch
        if by_length:
            window = size * _WINDOW
            windows = (shuffled[first : first + window] for first in range(0, len(shuffled), window))
            shuffled = [i for each in windows for i in sorted(each, key=lambda i: len(self.examples[i].ids))]
        batches = [shuffled[first : first + size] for first in range(0, len(shuffled), size)]
        if by_length:
            rng.shuffle(batches)
        return batches


def weighted_logits(model: Any, batch: Batch) -> Tensor:
    """[k, vocabulary]: of the tokens that have a weight; the others' are never computed."""
    # Qwen-VL models keep the offset of the last batch's positions.
    model.model.rope_deltas = None
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state
    logits: Tensor = model.lm_head(hidden.flatten(0, 1)[batch.positions])
    return logits


def _coordinates(renderer: Renderer, model: Any) -> Coordinates | None:
    """The tokens of the coordinates, where the checkpoint has one for each."""
    encoded = [renderer.encode(word) for word in COORDINATES]
    if any(len(ids) != 1 for ids in encoded):
        return None
    return Coordinates.of([ids[0] for ids in encoded], int(model.get_output_embeddings().weight.shape[0]))


def append_metrics(path: Path, metrics: dict[str, float]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(metrics) + "\n")
