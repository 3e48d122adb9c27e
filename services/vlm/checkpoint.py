"""A checkpoint folder → a model that is ready to run, with what an engine must know of its vocabulary."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, GenerationConfig
from transformers.utils import logging

from agentiad.v1.policy_pb2 import PolicyCard
from services.vlm.card import read_card
from services.vlm.render import Renderer


@dataclass(frozen=True)
class Vocabulary:
    """What an engine must know of a checkpoint's tokens."""

    # A turn ends after any of these.
    stop_ids: frozenset[int]
    # Never sampled: special tokens that no turn may hold (vision placeholders, turn openings) and rows of the output
    # layer that stand for no token.
    banned_ids: tuple[int, ...]
    # Tokens that begin the JSON words `true` and `false`, with and without a leading space.
    true_ids: tuple[int, ...]
    false_ids: tuple[int, ...]
    # After these the text may end in `"anomaly_present":`; blanks may follow it.
    colon_ids: frozenset[int]
    blank_ids: frozenset[int]


@dataclass(frozen=True)
class LoadedPolicy:
    model: Any
    renderer: Renderer
    card: PolicyCard
    vocabulary: Vocabulary
    device: torch.device


def load(path: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> LoadedPolicy:
    """Loads any transformers image-text-to-text checkpoint, offline, in evaluation mode.

    Raises OSError or ValueError when the folder is no such checkpoint.
    """
    path = Path(path)
    if not (path / "config.json").exists():
        raise ValueError(f"{path} holds no checkpoint (config.json is missing)")
    renderer = Renderer.from_checkpoint(path)
    logging.disable_progress_bar()  # it would draw over structured logs
    model = _load_model(path, dtype).to(device).eval()
    card = card_of(path, sha256_of(path))
    rows = int(model.get_output_embeddings().weight.shape[0])
    vocabulary = read_vocabulary(renderer, stop_ids(model.generation_config), rows)
    return LoadedPolicy(model, renderer, card, vocabulary, torch.device(device))


def card_of(path: Path, sha256: str) -> PolicyCard:
    """The folder's card; a foreign checkpoint's version is its name and the beginning of its weights' digest.

    Raises ValueError: the card cannot be read.
    """
    return read_card(path, default_version=f"{path.resolve().name}-{sha256[:12]}")


def _load_model(path: Path, dtype: torch.dtype) -> Any:
    try:
        model, report = AutoModelForImageTextToText.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    # transformers only warns, and fills the gaps with random numbers.
    if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
        raise ValueError(f"{path} lacks weights of its model: {', '.join(missing[:3])}…")
    return model


def sha256_of(path: str | Path) -> str:
    """Digest over the folder's safetensors files, one after the other in the order of their names.

    Raises ValueError: there are none.
    """
    files = sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{path} holds no safetensors files")
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def read_vocabulary(renderer: Renderer, stop_ids: Iterable[int], rows: int) -> Vocabulary:
    """Looks at every token once. `stop_ids`: as the checkpoint's generation settings name them; `rows`: of the output
    layer.
    """
    tokenizer = renderer.processor.tokenizer
    stops = frozenset([*stop_ids, renderer.end_of_turn_id])
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = {id: renderer.decode([id]) for id in range(min(rows, len(tokenizer)))}
    return Vocabulary(
        stop_ids=stops,
        banned_ids=tuple(sorted((special | set(range(len(tokenizer), rows))) - stops)),
        true_ids=tuple(id for id, word in words.items() if _begins(word, "true")),
        false_ids=tuple(id for id, word in words.items() if _begins(word, "false")),
        colon_ids=frozenset(id for id, word in words.items() if word.rstrip().endswith(":")),
        blank_ids=frozenset(id for id, word in words.items() if word and not word.strip()),
    )


def stop_ids(generation_config: GenerationConfig) -> list[int]:
    """The ids that end a turn, by the checkpoint's generation settings."""
    configured = generation_config.eos_token_id
    return configured if isinstance(configured, list) else [] if configured is None else [configured]


def _begins(token: str, word: str) -> bool:
    stripped = token.lstrip()
    return bool(stripped) and (word.startswith(stripped) or stripped.startswith(word))
