"""The engine `transformers`: the model's own forward in a short loop that batches across requests.

    generate ──prepare (threads: render, match prefix, read pixels)──▶ waiting ──▶ the engine's thread:
                                                                                join → step → step → … → deliver

The front lives in the caller's event loop; one thread owns the model, the batch and nothing else.
Invariant: `_places` counts the requests between `generate` and its answer; it never exceeds max_batch + max_queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis.errors import BadInput, Exhausted, Transient
from services.policy import sampling as sampler
from services.policy.batch import Batch
from services.policy.prefix_cache import PrefixCache
from services.policy.prompt import Pixels, Prompt, make_prompt, suffix_after
from services.policy.row import Outcome, Row, asks_for_verdict
from services.vlm.checkpoint import LoadedPolicy
from services.vlm.render import Chunk, TokenChunk

# Threads that render prompts and preprocess images beside the engine's.
_PREPARING_THREADS = 4


@dataclass(frozen=True)
class EngineLimits:
    """`max_context`: tokens of prompt and turn together; 0 takes the model's own."""

    max_batch: int = 32
    max_queue: int = 256
    max_context: int = 0
    prefix_cache_bytes: int = 512 * 2**20
    # 0 leaves torch's own choice.
    threads: int = 0


class TransformersEngine:
    """Serves one loaded checkpoint.

    `load_image` opens an image (blocking; called in threads) and raises BadInput or NotFound.
    """

    def __init__(
        self, policy: LoadedPolicy, load_image: Callable[[pb.Image], Image.Image], limits: EngineLimits | None = None
    ) -> None:
        self._policy, self._load_image, self._limits = policy, load_image, limits or EngineLimits()
        own = int(policy.model.config.get_text_config().max_position_embeddings)
        self._max_context = min(own, self._limits.max_context or own)
        self._cache = PrefixCache(self._limits.prefix_cache_bytes)
        self._places = 0
        self._ended = False
        self._failure: Exception | None = None
        self._arrivals: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._preparers = ThreadPoolExecutor(_PREPARING_THREADS, thread_name_prefix="policy-prepare")
        self._thread = threading.Thread(target=self._run, name="policy-engine", daemon=True)
        self._thread.start()

    @property
    def card(self) -> PolicyCard:
        return self._policy.card

    @property
    def prefix_bytes(self) -> int:
        """Memory that kept prefixes take now."""
        return self._cache.size

    async def generate(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deadline: float | None = None
    ) -> pb.Generation:
        """See services.policy.engine.Engine."""
        if self._places >= self._limits.max_batch + self._limits.max_queue:
            raise Exhausted(f"the policy already has {self._places} requests")
        self._places += 1
        try:
            async with asyncio.timeout(None if deadline is None else max(0.0, deadline - time.monotonic())):
                return await self._generate(messages, sampling)
        except TimeoutError as error:
            raise Transient("the deadline has passed") from error
        finally:
            self._places -= 1

    async def close(self) -> None:
        """See services.policy.engine.Engine."""
        self._arrivals.put(None)
        await asyncio.to_thread(self._thread.join)
        self._preparers.shutdown(wait=False)  # what it still prepares finds the engine closed

    async def _generate(self, messages: Sequence[pb.Message], sampling: pb.Sampling) -> pb.Generation:
        self._check_alive()
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[pb.Generation] = loop.create_future()
        deliver = partial(_deliver, loop, answer)
        row = await loop.run_in_executor(self._preparers, self._prepare, messages, sampling, deliver)
        self._arrivals.put(row)
        # After, not before: a row that came too late for the last sweep of `_run` sees here that it ended.
        self._check_alive()
        try:
            return await answer
        finally:
            row.cancelled = True  # no effect on a row that has been delivered

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

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise RuntimeError("the engine has failed") from self._failure
        if self._ended:
            raise Transient("this policy version is closed")

    def _run(self) -> None:
        if self._limits.threads:
            torch.set_num_threads(self._limits.threads)
        batch = Batch(self._policy, self._cache, self._limits.max_batch)
        waiting: list[Row] = []
        try:
            with torch.inference_mode():
                while self._receive(waiting, block=not batch.rows and not waiting):
                    joining, waiting = batch.select([row for row in waiting if not row.cancelled])
                    batch.join(joining)
                    self._deliver_ended(batch)  # some end with their first token
                    batch.step()
                    self._deliver_ended(batch)
            end: Exception = Transient("this policy version is closed")
        except Exception as error:  # a bug or a broken device: whoever waits must hear of it, and so must who comes
            self._failure = end = error
        self._ended = True
        for row in [*batch.rows, *waiting, *_drain(self._arrivals)]:
            row.deliver(end)

    def _deliver_ended(self, batch: Batch) -> None:
        for row in batch.remove_ended():
            row.deliver(self._generation(row))

    def _receive(self, waiting: list[Row], block: bool) -> bool:
        """Moves arrivals to `waiting`; False once the engine is told to close."""
        while True:
            try:
                row = self._arrivals.get(block=block)
            except queue.Empty:
                return True
            if row is None:
                return False
            waiting.append(row)
            block = False

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


def _deliver(loop: asyncio.AbstractEventLoop, answer: asyncio.Future[pb.Generation], outcome: Outcome) -> None:
    """Called in the engine's thread."""
    with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
        loop.call_soon_threadsafe(_resolve, answer, outcome)


def _resolve(answer: asyncio.Future[pb.Generation], outcome: Outcome) -> None:
    if answer.done():  # nobody waits any more
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _drain(arrivals: queue.SimpleQueue[Row | None]) -> list[Row]:
    rows = []
    while not arrivals.empty():
        row = arrivals.get()
        if row is not None:
            rows.append(row)
    return rows
