"""Messages → token ids and pixels, the same for serving, training and data.

Invariants:
- Piecewise: the markup around messages comes from the checkpoint's own chat template, once per pair of roles; every
  text segment is tokenised by itself; `tokens` segments go in verbatim.
- Prefix-stable: if a conversation is continued by the ids that the policy generated, the rendering of the longer one
  starts with the chunks of the shorter one followed by those ids. Hence the markup between two messages depends on
  their roles alone, and the markup before an assistant's turn is always the generation prompt.
- No text segment can produce a special token (`<|im_start|>`, `<|image_pad|>`, …).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.vlm.processor import Processor, load_processor

_NAMES = {pb.ROLE_SYSTEM: "system", pb.ROLE_USER: "user", pb.ROLE_ASSISTANT: "assistant"}
# Stand in for contents while a template is probed; nothing that a template would strip, escape or look into.
_MARKS = ("@@A@@", "@@B@@", "@@C@@")


@dataclass(frozen=True)
class TokenChunk:
    """Consecutive ids. `assistant`: part of what an assistant says, its end-of-turn id included."""

    ids: tuple[int, ...]
    assistant: bool = False


@dataclass(frozen=True)
class ImageChunk:
    """Stands for the placeholder ids of one image; how many there are depends on its pixels."""

    image: pb.Image


Chunk = TokenChunk | ImageChunk
Content = str | list[dict[str, str]]


class Renderer:
    """Renders for one checkpoint. Thread-safe."""

    def __init__(self, processor: Processor) -> None:
        self.processor = processor
        self.image_token_id = processor.image_token_id
        self.vocabulary_size = len(processor.tokenizer)
        # Kept per instance (not on the methods), so that a renderer can be collected.
        self._text = lru_cache(maxsize=4096)(self._encode_text)
        self._before = lru_cache(maxsize=None)(self._markup_before)
        self._generation_prompt = lru_cache(maxsize=None)(self._markup_generation_prompt)
        self.end_of_turn_id = self._between(pb.ROLE_ASSISTANT, pb.ROLE_USER)[0]
        self._before_image, self._after_image = self._image_markup()

    @classmethod
    def from_checkpoint(cls, path: str | Path) -> Renderer:
        """Raises OSError or ValueError when the folder cannot be read."""
        return cls(load_processor(path))

    def render(self, messages: Sequence[pb.Message], *, open_end: bool = True) -> list[Chunk]:
        """Chunks of a conversation.

        With `open_end` the conversation waits for the policy: a last message of the assistant is left open, any other
        is followed by the generation prompt. Without, a last message of the assistant gets its end-of-turn id (as
        training wants it).
        Raises ValueError: no messages, no role, an empty segment, or ids that the policy cannot have said.
        """
        if not messages:
            raise ValueError("no messages")
        chunks: list[Chunk] = []
        for index, message in enumerate(messages):
            role, last = _role(message), index == len(messages) - 1
            chunks += self._tokens(self._before(_role(messages[index - 1]) if index else None, role))
            start = len(chunks)
            for segment in message.segments:
                chunks += self._segment(segment, role == pb.ROLE_ASSISTANT)
            if role == pb.ROLE_ASSISTANT:
                if not (last and open_end) and not _ends_in(chunks[start:], self.end_of_turn_id):
                    chunks.append(TokenChunk((self.end_of_turn_id,), assistant=True))
            elif last and open_end:
                chunks += self._tokens(self._generation_prompt(role))
        return chunks

    def pixels(self, images: Sequence[Image.Image]) -> dict[str, torch.Tensor]:
        """The checkpoint's own preprocessing: `pixel_values` float32 [patches, patch size], `image_grid_thw` int64
        [images, 3] (time, height, width in patches). Raises ValueError: an aspect ratio beyond the processor's limit.
        """
        batch = self.processor.image_processor(images=list(images), return_tensors="pt")
        return {"pixel_values": batch["pixel_values"], "image_grid_thw": batch["image_grid_thw"]}

    def image_tokens(self, grid_thw: Sequence[int] | torch.Tensor) -> int:
        """How many placeholder ids an image of this grid takes."""
        time, height, width = (int(size) for size in grid_thw)
        return time * height * width // int(self.processor.image_processor.merge_size) ** 2

    def expand(self, chunks: Sequence[Chunk], grids: torch.Tensor | Sequence[Sequence[int]]) -> list[int]:
        """Input ids of `chunks`; `grids` [images, 3] in the order of the image chunks."""
        ids: list[int] = []
        remaining = iter(grids)
        for chunk in chunks:
            if isinstance(chunk, TokenChunk):
                ids += chunk.ids
            else:
                ids += [self.image_token_id] * self.image_tokens(next(remaining))
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of a text segment."""
        return list(self._text(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens are written out, so strip an end of turn before."""
        return str(self.processor.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def _segment(self, segment: pb.Segment, assistant: bool) -> Iterator[Chunk]:
        match segment.WhichOneof("content"):
            case "text":
                yield from self._tokens(self._text(segment.text), assistant)
            case "tokens":
                yield from self._tokens(self._checked(tuple(segment.tokens.ids)), assistant)
            case "image":
                yield from self._tokens(self._before_image)
                yield ImageChunk(segment.image)
                yield from self._tokens(self._after_image)
            case _:
                raise ValueError("a segment without content")

    def _tokens(self, ids: tuple[int, ...], assistant: bool = False) -> list[Chunk]:
        return [TokenChunk(ids, assistant)] if ids else []

    def _checked(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        for token in ids:
            if not 0 <= token < self.vocabulary_size or token == self.image_token_id:
                raise ValueError(f"token id {token} is not one that a policy can have said")
        return ids

    def _markup_before(self, previous: pb.Role.ValueType | None, role: pb.Role.ValueType) -> tuple[int, ...]:
        """Ids between a message and the one before it; of the opening for the first message."""
        if previous is None:
            return self._markup(self._template([(role, _MARKS[0])]).split(_MARKS[0])[0])
        if previous == pb.ROLE_ASSISTANT:
            # The end-of-turn id belongs to the assistant's own words.
            return self._between(previous, role)[1:]
        return self._generation_prompt(previous) if role == pb.ROLE_ASSISTANT else self._between(previous, role)

    def _between(self, before: pb.Role.ValueType, after: pb.Role.ValueType) -> tuple[int, ...]:
        lead = [(pb.ROLE_USER, _MARKS[2])] if before == pb.ROLE_ASSISTANT else []
        text = self._template([*lead, (before, _MARKS[0]), (after, _MARKS[1])])
        return self._markup(text.split(_MARKS[0])[1].split(_MARKS[1])[0])

    def _markup_generation_prompt(self, role: pb.Role.ValueType) -> tuple[int, ...]:
        text = self._template([(role, _MARKS[0])], add_generation_prompt=True)
        return self._markup(text.split(_MARKS[0])[1])

    def _image_markup(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        content = [{"type": "text", "text": _MARKS[0]}, {"type": "image"}, {"type": "text", "text": _MARKS[1]}]
        text = self._template([(pb.ROLE_USER, content)])
        ids = self._markup(text.split(_MARKS[0])[1].split(_MARKS[1])[0])
        if ids.count(self.image_token_id) != 1:
            raise ValueError("the chat template does not write one placeholder for an image")
        at = ids.index(self.image_token_id)
        return ids[:at], ids[at + 1 :]

    def _template(
        self, turns: Sequence[tuple[pb.Role.ValueType, Content]], *, add_generation_prompt: bool = False
    ) -> str:
        conversation: list[dict[str, Any]] = [{"role": _NAMES[role], "content": content} for role, content in turns]
        return str(
            self.processor.tokenizer.apply_chat_template(
                conversation,
                chat_template=self.processor.chat_template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        )

    def _markup(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.markup.encode(text, add_special_tokens=False).ids)

    def _encode_text(self, text: str) -> tuple[int, ...]:
        return tuple(self.processor.plain.encode(text, add_special_tokens=False).ids)


def _role(message: pb.Message) -> pb.Role.ValueType:
    if message.role not in _NAMES:
        raise ValueError("a message without a role")
    return message.role


def _ends_in(chunks: Sequence[Chunk], token: int) -> bool:
    return bool(chunks) and isinstance(chunks[-1], TokenChunk) and chunks[-1].ids[-1] == token
