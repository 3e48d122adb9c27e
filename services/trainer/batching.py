"""Trajectories → examples → padded batches, through the same renderer as at work.

Invariant: a weight above zero stands only on tokens that the policy itself chooses: never on a prompt, an observation
or the forced opening of a turn.
"""

import bisect
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from agentiad.v1 import trajectory_pb2 as pb
from services.trainer.settings import EVEN, TokenWeights
from services.vlm.render import Chunk, Renderer, TokenChunk

# What carries the decision in a reply: the verdict (at the start, when its opening was forced), numbers, the type.
_VERDICT = re.compile(r'(?:^|"anomaly_present":)(true|false)')
_GIVEN = re.compile(r'"anomaly_present"\s*:\s*(true|false)')
_NUMBER = re.compile(r"\d\.\d+")
_TYPE = re.compile(r'"top_anomaly":"([^"]*)"')


@dataclass(frozen=True)
class Example:
    """One episode, ready to be batched; small enough to keep by the ten thousand."""

    ids: npt.NDArray[np.int32]  # [n], image placeholders expanded
    weights: npt.NDArray[np.float32]  # [n], of saying ids[i]
    patches: npt.NDArray[np.uint8]  # [patches of all images, channels x patch x patch]
    grids: npt.NDArray[np.int64]  # [images, 3]
    marks: npt.NDArray[np.float32]  # [m, 6]: image, label, box in the image; for the vision pretext
    # [n], of rollouts: the log-probability of ids[i] under the policy that sampled it, where there is a weight.
    behaviour: npt.NDArray[np.float32] | None = None
    after_verdict: npt.NDArray[np.bool_] | None = None  # [n], of rollouts: ids[i] was said after the verdict
    emphasis: npt.NDArray[np.float32] | None = None  # [n], of rollouts: how much the kind of token counts


@dataclass(frozen=True)
class Batch:
    inputs: dict[str, Tensor]  # what the model's forward takes
    positions: Tensor  # int64 [k], into the flattened [batch x length]: where the next token is weighted
    targets: Tensor  # int64 [k]
    weights: Tensor  # float32 [k]
    marks: Tensor  # [m, 6], the image counted over the batch
    rows: Tensor  # int64 [k]: the example of each weighted token
    behaviour: Tensor  # float32 [k]; NaN where examples have none


class PixelCodec:
    """Patches as the image processor makes them ⇄ the bytes they came from: an eighth of the memory, nothing lost."""

    def __init__(self, image_processor: Any) -> None:
        self.frames = int(image_processor.temporal_patch_size)
        self.area = int(image_processor.patch_size) ** 2
        mean, std = (np.asarray(value, np.float32) for value in (image_processor.image_mean, image_processor.image_std))
        self._scale, self._shift = 255 * std[None, :, None], 255 * mean[None, :, None]

    def pack(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """[n, channels x frames x area] → [n, channels x area]; an image's frames are copies of one."""
        first = pixel_values.reshape(len(pixel_values), -1, self.frames, self.area)[:, :, 0]
        levels: npt.NDArray[np.uint8] = np.rint(first * self._scale + self._shift).clip(0, 255).astype(np.uint8)
        return levels.reshape(len(first), -1)

    def unpack(self, patches: npt.NDArray[np.uint8]) -> Tensor:
        values = (patches.reshape(len(patches), -1, self.area) - self._shift) / self._scale
        return torch.from_numpy(np.repeat(values[:, :, None], self.frames, axis=2).reshape(len(patches), -1))


def encode(
    trajectory: pb.Trajectory,
    images: Sequence[Image.Image],
    imitate: Sequence[bool],
    marks: npt.NDArray[np.float32],
    renderer: Renderer,
    codec: PixelCodec,
    weights: TokenWeights,
) -> Example:
    """A demonstration. `images` in the order in which the episode shows them; `imitate`: of each assistant turn, shall
    it be learnt.
    """
    messages = [turn.message for turn in trajectory.turns]
    pixels = renderer.pixels(images)
    grids = pixels["image_grid_thw"]
    chunks = renderer.render(messages, open_end=False)
    placed = _placed(chunks, grids, renderer, _said(messages, imitate, renderer, weights), 0.0)
    return Example(
        np.asarray(renderer.expand(chunks, grids), np.int32),
        placed,
        codec.pack(pixels["pixel_values"].numpy()),
        grids.numpy(),
        marks,
    )


def encode_rollout(
    trajectory: pb.Trajectory,
    patches: npt.NDArray[np.uint8],
    grids: npt.NDArray[np.int64],
    renderer: Renderer,
    emphasis: TokenWeights = EVEN,
) -> Example:
    """A sampled episode: ids verbatim, weight 1 on each token that the policy chose. `patches` (packed) and `grids` of
    all its images in their order.
    """
    chunks = renderer.render([turn.message for turn in trajectory.turns], open_end=False)
    tensor = torch.from_numpy(grids)
    chosen, behaviour, after, kinds = _sampled(trajectory, renderer, emphasis)
    return Example(
        np.asarray(renderer.expand(chunks, tensor), np.int32),
        _placed(chunks, tensor, renderer, iter(chosen), 0.0),
        patches,
        grids,
        np.zeros((0, 6), np.float32),
        _placed(chunks, tensor, renderer, iter(behaviour), np.nan),
        _placed(chunks, tensor, renderer, iter(after), 0.0) > 0,
        _placed(chunks, tensor, renderer, iter(kinds), 0.0),
    )


def _placed(
    chunks: Sequence[Chunk], grids: Tensor, renderer: Renderer, said: Iterator[list[float]], elsewhere: float
) -> npt.NDArray[np.float32]:
    """[n]: what `said` has for each assistant chunk in turn, `elsewhere` for all other tokens."""
    placed: list[float] = []
    remaining = iter(grids)
    for chunk in chunks:
        if not isinstance(chunk, TokenChunk):
            placed += [elsewhere] * renderer.image_tokens(next(remaining))
        elif chunk.assistant:
            placed += next(said)
        else:
            placed += [elsewhere] * len(chunk.ids)
    return np.asarray(placed, np.float32)


def collate(examples: Sequence[Example], codec: PixelCodec, padding_id: int, image_token_id: int) -> Batch:
    """Pads on the right: with causal attention no real token sees the padding, so no mask is needed."""
    length = max(len(example.ids) for example in examples)
    ids = np.full((len(examples), length), padding_id, np.int64)
    weights = np.zeros((len(examples), length), np.float32)
    behaviour = np.full((len(examples), length), np.nan, np.float32)
    marks, images = [], 0
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        weights[row, : len(example.ids)] = example.weights
        if example.behaviour is not None:
            behaviour[row, : len(example.ids)] = example.behaviour
        marks.append(example.marks + np.array([images, 0, 0, 0, 0, 0], np.float32))
        images += len(example.grids)
    # The token at position i is predicted from position i - 1.
    rows, columns = np.nonzero(weights[:, 1:])
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(ids),
            "mm_token_type_ids": torch.from_numpy((ids == image_token_id).astype(np.int32)),
            "pixel_values": codec.unpack(np.concatenate([example.patches for example in examples])),
            "image_grid_thw": torch.from_numpy(np.concatenate([example.grids for example in examples])),
        },
        positions=torch.from_numpy(rows * length + columns),
        targets=torch.from_numpy(ids[rows, columns + 1]),
        weights=torch.from_numpy(weights[rows, columns + 1]),
        marks=torch.from_numpy(np.concatenate(marks)),
        rows=torch.from_numpy(rows),
        behaviour=torch.from_numpy(behaviour[rows, columns + 1]),
    )


def text_weights(text: str, offsets: Sequence[tuple[int, int]], weights: TokenWeights) -> list[float]:
    """The weight of each token of a reply, from the characters it covers; the heaviest thing it holds counts."""
    spans = [(*match.span(1), weights.verdict) for match in _VERDICT.finditer(text)]
    spans += [(*match.span(), weights.coordinate) for match in _NUMBER.finditer(text)]
    spans += [(*match.span(1), weights.type) for match in _TYPE.finditer(text)]
    return [
        max([weights.word, *(weight for first, last, weight in spans if first < end and start < last)])
        for start, end in offsets
    ]


def _said(
    messages: Sequence[pb.Message], imitate: Sequence[bool], renderer: Renderer, weights: TokenWeights
) -> Iterator[list[float]]:
    """Weights of each assistant chunk in turn: the segments of a message, then its end of turn."""
    turns = [message for message in messages if message.role == pb.ROLE_ASSISTANT]
    for message, learn in zip(turns, imitate, strict=True):
        for index, segment in enumerate(message.segments):
            own = learn and index == len(message.segments) - 1
            encoding = renderer.processor.plain.encode(segment.text, add_special_tokens=False)
            yield text_weights(segment.text, encoding.offsets, weights) if own else [0.0] * len(encoding.ids)
        yield [weights.word if learn else 0.0]


def _sampled(trajectory: pb.Trajectory, renderer: Renderer, emphasis: TokenWeights) -> tuple[list[list[float]], ...]:
    """Of each assistant chunk: 1 where the policy chose the token; its log-probability there; 1 after the verdict; what
    its kind counts.
    """
    columns: tuple[list[list[float]], ...] = ([], [], [], [])

    def add(*values: list[float]) -> None:
        for column, value in zip(columns, values, strict=True):
            column.append(value)

    for number, turn in enumerate(trajectory.turns, 1):
        if turn.message.role != pb.ROLE_ASSISTANT:
            continue
        said = turn.generation
        opening = "".join(segment.text for segment in turn.message.segments[:-1])
        for segment in turn.message.segments[:-1]:  # the forced beginning
            forced = len(renderer.encode(segment.text))
            add([0.0] * forced, [math.nan] * forced, [0.0] * forced, [0.0] * forced)
        # A verdict in a reply that could not be read was not the one that counts.
        counts = number == len(trajectory.turns)
        verdict = _verdict_length(opening, said.token_ids, renderer) if counts else len(said.token_ids)
        tail = [0.0] * verdict + [1.0] * (len(said.token_ids) - verdict)
        kinds = _kinds(said.token_ids, renderer, emphasis)
        add([float(own) for own in said.loss_mask], list(said.log_probabilities), tail, kinds)
        if said.token_ids[-1] != renderer.end_of_turn_id:  # then the renderer adds it
            add([0.0], [math.nan], [0.0], [0.0])
    return columns


def _kinds(ids: Sequence[int], renderer: Renderer, emphasis: TokenWeights) -> list[float]:
    """What each token of a reply counts. Characters that are split between tokens do not matter: no kind has any."""
    pieces = [renderer.decode([token]) for token in ids]
    ends = list(itertools.accumulate(map(len, pieces)))
    offsets = [(end - len(piece), end) for piece, end in zip(pieces, ends, strict=True)]
    return text_weights("".join(pieces), offsets, emphasis)


def _verdict_length(opening: str, ids: Sequence[int], renderer: Renderer) -> int:
    """How many of a turn's ids there are up to its verdict and with it; all of them, where it gives none."""

    def given(length: int) -> bool:
        return _GIVEN.search(opening + renderer.decode(ids[:length])) is not None

    if not given(len(ids)):
        return len(ids)
    return bisect.bisect_left(range(1, len(ids)), True, key=given) + 1
