"""The engine `vllm`: scheduling, paging and prefix caching are vLLM's; ids, pixels and the verdict are ours.

In the engine's thread (`threaded.py`): add → step → step → … → deliver. vLLM runs the model in a process of its own
(in Triton, in the stub, which is one) and never sees a picture or a text: it gets the ids of the whole prompt and each
image's patches as the checkpoint's own processor makes them, under the image's sha256, by which it knows what it has
seen before.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# vLLM reads its environment when it is imported. Of its two model runners `SeededSampler` is written for the first,
# the only one on CPUs.
os.environ |= {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    # A process that holds gRPC's threads and ports must not be forked.
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}

import torch
from PIL import Image
from transformers import AutoConfig, BatchFeature, GenerationConfig
from vllm import EngineArgs, LLMEngine, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.inputs.engine import mm_input, tokens_input
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems, PlaceholderRange
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.core_client import SyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.errors import BadInput, Transient
from services.policy import sampling as sampler
from services.policy.prompt import Pixels, image_digest, make_prompt
from services.policy.row import asks_for_verdict, verdict_follows
from services.policy.settings import EngineSettings
from services.policy.threaded import Outcome, ThreadedEngine
from services.policy.transformers_engine import forced_ids
from services.policy.vllm_sampler import SeededSampler, seeded_args
from services.vlm.checkpoint import Vocabulary, card_of, read_vocabulary, sha256_of, stop_ids
from services.vlm.render import ImageChunk, Renderer, TokenChunk

# Tokens in a block of the CPU's keys and values, the least that its kernels take; a prefix is found by whole blocks.
CPU_BLOCK = 32
# vLLM puts a refusal in its place, while each thread has a number of its own.
_set_threads = torch.set_num_threads
# How long the engine's thread waits for vLLM before it looks for arrivals and cancellations.
_TICK_S = 0.05
# vLLM's bound on the tokens whose log-probabilities are told beside the chosen one's.
_MAX_VERDICT_IDS = 128
# Keys and values of the running requests need room even where no prefix is kept.
_LEAST_KV_MIB = 256


@dataclass(eq=False)
class _Request:
    prompt: Any
    params: SamplingParams
    forced_ids: list[int]
    deliver: Callable[[Outcome], None]
    cancelled: bool = False
    key: str = ""
    output: Any = field(default=None, repr=False)


class VllmEngine(ThreadedEngine[_Request]):
    """Serves one checkpoint folder. Raises ValueError or OSError when it is none that vLLM can run."""

    def __init__(
        self, checkpoint: Path, version: str, load_image: Callable[[pb.Image], Image.Image], settings: EngineSettings
    ) -> None:
        if (settings.device == "cpu") != current_platform.is_cpu():
            raise ValueError(
                f"DEVICE is {settings.device!r}, but this vLLM is built for {current_platform.device_type}"
            )
        card = card_of(checkpoint, sha256_of(checkpoint))
        card.version = version or card.version
        super().__init__(card, settings.max_batch + settings.max_queue)
        self._load_image = load_image
        self._renderer = Renderer.from_checkpoint(checkpoint)
        config = AutoConfig.from_pretrained(checkpoint, local_files_only=True)
        text = config.get_text_config()
        generation = GenerationConfig.from_pretrained(checkpoint, local_files_only=True)
        self._rows = int(text.vocab_size)
        self._vocabulary = read_vocabulary(self._renderer, stop_ids(generation), self._rows)
        if len(self._vocabulary.true_ids) + len(self._vocabulary.false_ids) > _MAX_VERDICT_IDS:
            raise ValueError(f"more than {_MAX_VERDICT_IDS} tokens begin a verdict; vLLM tells of no more")
        self._max_context = min(int(text.max_position_embeddings), settings.max_context or 2**31)
        self._max_images = settings.max_images
        self._pixels = _PixelCache(settings.image_cache_mib * 2**20)
        self._keys = map(str, itertools.count())
        self._waiting: list[_Request] = []
        self._running: dict[str, _Request] = {}
        self._threads = _claim_threads(settings.torch_threads) if settings.device == "cpu" else 0
        self._engine = LLMEngine.from_engine_args(_arguments(checkpoint, settings, self._vocabulary, self._max_context))
        self._start()

    def _prepare(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deliver: Callable[[Outcome], None]
    ) -> _Request:
        try:
            sampler.check(sampling)
            chunks = make_prompt(self._renderer.render(messages)).chunks
            images = [chunk.image for chunk in chunks if isinstance(chunk, ImageChunk)]
            # Before any pixel is read: an image takes at least one token.
            self._check_length(sum(len(chunk.ids) if isinstance(chunk, TokenChunk) else 1 for chunk in chunks))
            if len(images) > self._max_images:
                raise ValueError(f"{len(images)} images, {self._max_images} is the limit")
            digests = [image_digest(image).hex() for image in images]
            pixels = [self._read(image, digest) for image, digest in zip(images, digests, strict=True)]
            grids = torch.cat([each.grid for each in pixels]) if pixels else torch.empty(0, 3)
            ids = self._renderer.expand(chunks, grids)
            if max(ids) >= self._rows:
                raise ValueError(f"token id {max(ids)} is not one of the model's {self._rows}")
        except ValueError as error:
            raise BadInput(str(error)) from error
        self._check_length(len(ids))
        if pixels:
            values = torch.cat([each.values for each in pixels])
            prompt = mm_input(ids, _items(values, grids), {"image": digests}, {"image": self._placeholders(ids, grids)})
        else:
            prompt = tokens_input(ids)
        return _Request(prompt, self._params(sampling, len(ids)), forced_ids(chunks), deliver)

    def _check_length(self, prompt_tokens: int) -> None:
        """There must be room for one more."""
        if prompt_tokens >= self._max_context:
            raise BadInput(f"the prompt has {prompt_tokens} tokens or more, {self._max_context} is the limit")

    def _read(self, image: pb.Image, digest: str) -> Pixels:
        found = self._pixels.get(digest)
        if found is None:
            batch = self._renderer.pixels([self._load_image(image)])
            found = Pixels(batch["pixel_values"], batch["image_grid_thw"])
            self._pixels.put(digest, found)
        return found

    def _serve(self) -> None:
        if self._threads:
            _set_threads(self._threads)
        while self._receive(self._waiting, block=not self._running and not self._waiting):
            while self._waiting:
                self._add(self._waiting.pop(0))
            if gone := [key for key, request in self._running.items() if request.cancelled]:
                self._engine.abort_request(gone)
                for key in gone:
                    del self._running[key]
            if self._running and self._has_output():
                for output in self._engine.step():
                    self._take(output)

    def _add(self, request: _Request) -> None:
        if request.cancelled:
            return
        request.key = next(self._keys)
        self._running[request.key] = request
        try:
            self._engine.add_request(request.key, request.prompt, request.params)
        except (ValueError, VLLMValidationError) as error:  # a limit of vLLM's own
            del self._running[request.key]
            request.deliver(BadInput(str(error)))

    def _has_output(self) -> bool:
        """Whether `step` would return at once; waits a tick. Raises EngineDeadError.

        vLLM's own waiting has no end: not when the last request was aborted, and not when its process was killed.
        """
        core = self._engine.engine_core
        if not isinstance(core, SyncMPClient):  # in this process: a step computes
            return True
        if core.resources.engine_dead:
            raise EngineDeadError
        outputs = core.outputs_queue
        with outputs.not_empty:
            return bool(outputs._qsize() or outputs.not_empty.wait(_TICK_S))

    def _take(self, output: Any) -> None:
        request = self._running.get(output.request_id)
        if request is None or not output.finished:
            return
        reason = output.outputs[0].finish_reason
        if reason in ("stop", "length"):
            request.deliver(self._generation(request, output))
        else:  # vLLM is being stopped, or has given the request up
            request.deliver(Transient(f"vLLM ended the request: {reason}"))
        del self._running[output.request_id]

    def _unanswered(self) -> Iterable[_Request]:
        return [*self._running.values(), *self._waiting]

    def _release(self) -> None:
        self._engine.engine_core.shutdown()

    def _placeholders(self, ids: Sequence[int], grids: torch.Tensor) -> list[PlaceholderRange]:
        ranges, position = [], 0
        for grid in grids:
            count = self._renderer.image_tokens(grid)
            position = ids.index(self._renderer.image_token_id, position)
            ranges.append(PlaceholderRange(offset=position, length=count))
            position += count
        return ranges

    def _params(self, sampling: pb.Sampling, prompt_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            extra_args=seeded_args(sampling.temperature, sampling.top_p, sampling.seed),
            max_tokens=min(sampling.max_new_tokens, self._max_context - prompt_tokens),
            stop_token_ids=sorted(self._vocabulary.stop_ids),
            logprob_token_ids=[*self._vocabulary.true_ids, *self._vocabulary.false_ids],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _generation(self, request: _Request, output: Any) -> pb.Generation:
        completion = output.outputs[0]
        ids = list(completion.token_ids)
        stopped = ids[-1] in self._vocabulary.stop_ids
        distributions = completion.logprobs
        generation = pb.Generation(
            token_ids=ids,
            log_probabilities=[distributions[i][token].logprob for i, token in enumerate(ids)],
            loss_mask=[True] * len(ids),
            text=self._renderer.decode(ids[:-1] if stopped else ids),
            finish_reason=pb.FINISH_REASON_STOP if stopped else pb.FINISH_REASON_LENGTH,
            policy_version=self.card.version,
            prompt_tokens=len(output.prompt_token_ids),
            cached_tokens=output.num_cached_tokens or 0,
        )
        place = self._verdict_place(request.forced_ids, ids)
        if place is not None:
            true, false = (
                torch.tensor([distributions[place][id].logprob for id in group]).logsumexp(0)
                for group in (self._vocabulary.true_ids, self._vocabulary.false_ids)
            )
            generation.anomaly_probability = float((true - false).sigmoid())
        return generation

    def _verdict_place(self, forced: list[int], ids: Sequence[int]) -> int | None:
        """The last position in `ids` at which the verdict was chosen."""
        place, said = None, list(forced)
        asked = bool(said) and asks_for_verdict(self._renderer.decode(said))
        for position, token in enumerate(ids):
            if asked:
                place = position
            said.append(token)
            asked = verdict_follows(asked, said, self._vocabulary, self._renderer.decode)
        return place


class _PixelCache:
    """The preprocessed images that were used last, by digest, in at most `limit` bytes. Safe for threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._size = limit, 0
        self._kept: OrderedDict[str, Pixels] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, digest: str) -> Pixels | None:
        with self._lock:
            if digest in self._kept:
                self._kept.move_to_end(digest)
            return self._kept.get(digest)

    def put(self, digest: str, pixels: Pixels) -> None:
        with self._lock:
            if digest not in self._kept:
                self._kept[digest] = pixels
                self._size += pixels.values.nbytes
            while self._size > self._limit:
                self._size -= self._kept.popitem(last=False)[1].values.nbytes


def _items(values: torch.Tensor, grids: torch.Tensor) -> MultiModalKwargsItems[Any]:
    """One item an image, from the patches [patches, patch size] of all and their grids int64 [images, 3]."""
    fields = {
        "pixel_values": MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
        "image_grid_thw": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    return MultiModalKwargsItems.from_hf_inputs(BatchFeature({"pixel_values": values, "image_grid_thw": grids}), fields)


def _claim_threads(count: int) -> int:
    """For the model; 0: all that this process may use. Left to itself vLLM takes one and keeps a core free."""
    count = count or len(os.sched_getaffinity(0))
    os.environ |= {"OMP_NUM_THREADS": str(count), "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    _set_threads(count)
    return count


def _arguments(checkpoint: Path, settings: EngineSettings, vocabulary: Vocabulary, max_context: int) -> EngineArgs:
    on_cpu = settings.device == "cpu"
    return EngineArgs(
        model=str(checkpoint),
        dtype=settings.dtype,
        max_model_len=max_context,
        max_num_seqs=settings.max_batch,
        tensor_parallel_size=settings.tensor_parallel,
        gpu_memory_utilization=settings.gpu_memory_share,
        # Left to itself vLLM takes most of the machine's memory; a GPU is its own.
        kv_cache_memory_bytes=max(settings.prefix_cache_mib, _LEAST_KV_MIB) * 2**20 if on_cpu else None,
        block_size=CPU_BLOCK if on_cpu else None,
        enable_prefix_caching=settings.prefix_cache_mib > 0,
        # Images are kept by `_PixelCache`: vLLM would keep 4 GiB of them again.
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": settings.max_images, "video": 0},
        # The processor has done it: vLLM would normalise a second time, within the model.
        mm_device_do_normalize=False,
        enforce_eager=on_cpu,
        # Sampling is what the request says, never what a checkpoint's generation settings say.
        generation_config="vllm",
        logits_processors=[SeededSampler],
        additional_config={"banned_ids": list(vocabulary.banned_ids)},
        disable_log_stats=True,
        seed=0,
    )
