"""The engine `transformers`: the model's own forward in a short loop that batches across requests.

In the engine's thread (`threaded.py`): join → step → step → … → deliver.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput
from services.policy import sampling as sampler
from services.policy.batch import Batch
from services.policy.prefix_cache import PrefixCache
from services.policy.prompt import Pixels, Prompt, make_prompt, suffix_after
from services.policy.row import Row, asks_for_verdict
from services.policy.threaded import Outcome, ThreadedEngine
from services.vlm.checkpoint import LoadedPolicy
from services.vlm.render import Chunk, TokenChunk


@dataclass(frozen=True)
class EngineLimits:
    """`max_context`: tokens of prompt and turn together; 0 takes the model's own."""

    max_batch: int = 32
    max_queue: int = 256
    max_context: int = 0
    prefix_cache_bytes: int = 512 * 2**20
    # 0 leaves torch's own choice.
    threads: int = 0


class TransformersEngine(ThreadedEngine[Row]):
    """Serves one loaded checkpoint.

    `load_image` opens an image (blocking; called in threads) and raises BadInput or NotFound.
    """

    def __init__(
        self, policy: LoadedPolicy, load_image: Callable[[pb.Image], Image.Image], limits: EngineLimits | None = None
    ) -> None:
        self._policy, self._load_image, self._limits = policy, load_image, limits or EngineLimits()
        super().__init__(policy.card, self._limits.max_batch + self._limits.max_queue)
        own = int(policy.model.config.get_text_config().max_position_embeddings)
        self._max_context = min(own, self._limits.max_context or own)
        self._cache = PrefixCache(self._limits.prefix_cache_bytes)
        self._batch = Batch(policy, self._cache, self._limits.max_batch)
        self._waiting: list[Row] = []
        self._start()

    @property
    def prefix_bytes(self) -> int:
        """Memory that kept prefixes take now."""
        return self._cache.size

    def _prepare(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deliver: Callable[[Outcome], None]
    ) -> Row:
        """Everything that needs no model. Raises BadInput or NotFound."""
        try:
            sampler.check(sampling)
            prompt = make_prompt(self._policy.renderer.render(messages))
            # Before any pixel is read: an image takes at least one token.
            self._check_length(sum(len(chunk.ids) if isinstance(chunk, TokenChunk) else 1 for chunk in prompt.chunks))
            match = self._cache.match(prompt.boundaries)
            boundary, node = match or (None, None)
            self._read_pixels(prompt, prompt.images_from(boundary))
            suffix = suffix_after(prompt, boundary, self._policy.renderer)
        except ValueError as error:
            raise BadInput(str(error)) from error
        forced = forced_ids(prompt.chunks)
        row = Row(
            prompt=prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_new_tokens=sampling.max_new_tokens,
            forced_ids=forced,
            at_verdict=bool(forced) and asks_for_verdict(self._policy.renderer.decode(forced)),
            deliver=deliver,
            boundary=boundary,
            node=node,
            suffix=suffix,
        )
        self._check_length(row.prompt_tokens)
        row.max_new_tokens = min(row.max_new_tokens, self._max_context - row.prompt_tokens)
        row.uniform = sampler.random_numbers(sampling.seed, row.max_new_tokens)
        return row

    def _check_length(self, prompt_tokens: int) -> None:
        """There must be room for one more."""
        if prompt_tokens >= self._max_context:
            raise BadInput(f"the prompt has {prompt_tokens} tokens or more, {self._max_context} is the limit")

    def _read_pixels(self, prompt: Prompt, images: Sequence[tuple[int, pb.Image]]) -> None:
        for index, image in images:
            batch = self._policy.renderer.pixels([self._load_image(image)])
            prompt.pixels[index] = Pixels(batch["pixel_values"], batch["image_grid_thw"])

    def _serve(self) -> None:
        if self._limits.threads:
            torch.set_num_threads(self._limits.threads)
        batch = self._batch
        with torch.inference_mode():
            while self._receive(self._waiting, block=not batch.rows and not self._waiting):
                joining, self._waiting = batch.select([row for row in self._waiting if not row.cancelled])
                batch.join(joining)
                self._deliver_ended(batch)  # some end with their first token
                batch.step()
                self._deliver_ended(batch)

    def _unanswered(self) -> Iterable[Row]:
        return [*self._batch.rows, *self._waiting]

    def _deliver_ended(self, batch: Batch) -> None:
        for row in batch.remove_ended():
            row.deliver(self._generation(row))

    def _generation(self, row: Row) -> pb.Generation:
        ids = row.ids
        spoken = ids[:-1] if ids[-1] in self._policy.vocabulary.stop_ids else ids
        return pb.Generation(
            token_ids=ids,
            log_probabilities=row.log_probabilities,
            loss_mask=[True] * len(ids),
            text=self._policy.renderer.decode(spoken),
            finish_reason=row.finish_reason,
            policy_version=self.card.version,
            anomaly_probability=row.anomaly_probability,
            prompt_tokens=row.prompt_tokens,
            cached_tokens=row.cached_tokens,
        )


def forced_ids(chunks: Sequence[Chunk]) -> list[int]:
    """What the caller put into the assistant's open message, if there is one."""
    ids: list[int] = []
    for chunk in reversed(chunks):
        if not (isinstance(chunk, TokenChunk) and chunk.assistant):
            break
        ids[:0] = chunk.ids
    return ids
