"""Trained weights → a checkpoint folder that any policy service loads, and the event that says so."""

from __future__ import annotations

import shutil
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from agentiad.v1.events_pb2 import PolicyPublished
from services.chassis import topics
from services.chassis.bus import Bus, cloudevents
from services.vlm import card as cards
from services.vlm.checkpoint import sha256_of

SOURCE = "/agentiad/trainer"
PUBLISHED_TYPE = topics.TOPICS[topics.POLICIES].message.DESCRIPTOR.full_name


def save(model: Any, source: Path, out: Path, dtype: torch.dtype) -> None:
    """Writes `model` to the folder `out`, with tokenizer and image processor of the checkpoint `source`; no card."""
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and not file.name.startswith("model") and file.name != cards.FILE_NAME:
            shutil.copy2(file, out / file.name)
    model.config.dtype = dtype
    model.save_pretrained(out, state_dict={name: value.to(dtype) for name, value in model.state_dict().items()})


async def publish(bus: Bus, policy: str, folder: Path, version: str, evaluation: dict[str, float]) -> None:
    """Tells the policy services that follow `policy`. Publishing a version again makes it the newest one again."""
    published = PolicyPublished(
        event_id=uuid.uuid4().hex,
        policy=policy,
        version=version,
        checkpoint_uri=folder.resolve().as_uri(),
        sha256=sha256_of(folder),
        evaluation=evaluation,
    )
    now = datetime.now(UTC)
    published.published_at.FromDatetime(now)
    headers = cloudevents.headers(published.event_id, PUBLISHED_TYPE, SOURCE, now)
    await bus.publish(topics.POLICIES, topics.policy_key(policy, version), published.SerializeToString(), headers)


def prune(folder: Path, keep: int) -> None:
    """Removes the oldest version folders beyond `keep`; 0 keeps all."""
    versions = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    for path in versions[:-keep] if keep else []:
        shutil.rmtree(path)
