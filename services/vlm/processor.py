"""A checkpoint's processor without its video part, which wants torchvision."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer


@dataclass(frozen=True)
class Processor:
    """What turns words and pictures into a model's inputs.

    `plain` and `markup` are two copies of one tokenizer: `plain` reads `<|im_start|>` and its like as ordinary letters,
    so that no text of a caller can open a turn; `markup` reads them as the special tokens they are. Two copies, because
    the switch between the two modes is state that concurrent callers would share.
    """

    tokenizer: Any
    image_processor: Any
    chat_template: str
    plain: Tokenizer
    markup: Tokenizer
    image_token_id: int


def load_processor(path: str | Path) -> Processor:
    """Reads tokenizer, image processor and chat template of the checkpoint folder `path`. Never touches the network.

    Raises: OSError or ValueError when a part is missing or cannot be read.
    """
    path = Path(path)
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    image_processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    serialized = tokenizer.backend_tokenizer.to_str()
    plain, markup = Tokenizer.from_str(serialized), Tokenizer.from_str(serialized)
    plain.encode_special_tokens = True
    return Processor(tokenizer, image_processor, _chat_template(path, tokenizer), plain, markup, config.image_token_id)


def _chat_template(path: Path, tokenizer: Any) -> str:
    # Older checkpoints (Qwen2.5-VL) keep the template that knows images in a file of the processor.
    of_processor = path / "chat_template.json"
    if of_processor.exists():
        return str(json.loads(of_processor.read_text(encoding="utf-8"))["chat_template"])
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise ValueError(f"{path} has no chat template")
    return str(template)
