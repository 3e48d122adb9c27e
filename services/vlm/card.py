"""`agentiad_card.json` in a checkpoint folder ⇄ PolicyCard."""

from __future__ import annotations

from pathlib import Path

from google.protobuf import json_format

from agentiad.v1 import trajectory_pb2
from agentiad.v1.policy_pb2 import PolicyCard

FILE_NAME = "agentiad_card.json"


def read_card(path: str | Path, *, default_version: str = "") -> PolicyCard:
    """The card of the checkpoint folder `path`.

    A foreign checkpoint has none: it gets the version `default_version`, the folder's name as its base model, no
    categories, and sees comparisons side by side.

    Raises ValueError: the file is no card.
    """
    path = Path(path)
    file = path / FILE_NAME
    card = PolicyCard()
    if file.exists():
        try:
            json_format.Parse(file.read_text(encoding="utf-8"), card)
        except json_format.ParseError as error:
            raise ValueError(f"{file} is no policy card: {error}") from error
    card.version = card.version or default_version
    card.base_model = card.base_model or path.resolve().name
    card.comparison_view = card.comparison_view or trajectory_pb2.COMPARISON_VIEW_SIDE_BY_SIDE
    return card


def write_card(path: str | Path, card: PolicyCard) -> None:
    """Puts `card` into the checkpoint folder `path`."""
    text = json_format.MessageToJson(card, preserving_proto_field_name=True)
    (Path(path) / FILE_NAME).write_text(text + "\n", encoding="utf-8")
