"""From weights to a folder that a policy serves, and to the event that says so."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentiad.v1.events_pb2 import PolicyPublished
from services.chassis import topics
from services.chassis.bus import Event, cloudevents
from services.chassis.bus.sqlite import SqliteBus
from services.trainer import publishing
from services.vlm import card as cards
from services.vlm.checkpoint import load, sha256_of
from tests.policy.checkpoints import Architecture, make_tiny_checkpoint
from tests.reward import plant


def trained(model: Any) -> Any:
    """As after a step: every weight is another one."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    return model


@pytest.mark.parametrize("architecture", ["qwen3_vl", "qwen2_5_vl"])
def test_a_saved_version_is_the_trained_model(architecture: Architecture, tmp_path: Path) -> None:
    source = make_tiny_checkpoint(tmp_path / "source", architecture)
    model = trained(load(source).model)
    publishing.save(model, source, tmp_path / "out", torch.float32)
    # A card is the version's own, not its ancestor's.
    assert not (tmp_path / "out" / cards.FILE_NAME).exists()
    saved = load(tmp_path / "out")
    weights = saved.model.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert sha256_of(tmp_path / "out") != sha256_of(source)
    assert saved.vocabulary == load(source).vocabulary
    assert saved.renderer.encode("Image 1: bottle.") == load(source).renderer.encode("Image 1: bottle.")


def test_the_same_weights_are_the_same_version(tmp_path: Path) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    for name in ("one", "other"):
        publishing.save(load(source).model, source, tmp_path / name, torch.float32)
    assert sha256_of(tmp_path / "one") == sha256_of(tmp_path / "other")


def test_half_the_bytes_when_asked_for(tmp_path: Path) -> None:
    source = make_tiny_checkpoint(tmp_path / "source")
    publishing.save(load(source).model, source, tmp_path / "out", torch.bfloat16)
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (source, tmp_path / "out")]
    assert sizes[1] < 0.6 * sizes[0]
    assert load(tmp_path / "out", torch.bfloat16).model.dtype == torch.bfloat16


async def test_followers_hear_of_each_version_and_of_a_return_to_one(tmp_path: Path) -> None:
    folders = [make_tiny_checkpoint(tmp_path / f"v{seed}", seed=seed) for seed in range(2)]
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(topics.TOPICS)
    for number in (0, 1, 0):
        await publishing.publish(bus, "line7-candidate", folders[number], f"v{number}", {"reward": 0.5 + number})
    keys = ["line7-candidate/v0", "line7-candidate/v1"]
    events = await plant.read(bus, topics.POLICIES, keys, 3)
    await bus.close()
    assert [event.key for event in events] == [keys[0], keys[1], keys[0]]
    found = [PolicyPublished.FromString(event.value) for event in events]
    for event, published, number in zip(events, found, (0, 1, 0), strict=True):
        check_event(event, published)
        assert (published.policy, published.version) == ("line7-candidate", f"v{number}")
        assert published.checkpoint_uri == folders[number].as_uri()
        assert published.sha256 == sha256_of(folders[number])
        assert dict(published.evaluation) == {"reward": 0.5 + number}
    # A return is an event of its own: a copy would be passed over.
    assert len({published.event_id for published in found}) == 3


def check_event(event: Event, published: PolicyPublished) -> None:
    attributes = cloudevents.parse(event.headers)
    assert attributes.event_id == published.event_id
    assert attributes.type_name == "agentiad.v1.PolicyPublished"
    assert attributes.time is not None
    assert attributes.time.timestamp() == pytest.approx(published.published_at.ToNanoseconds() / 1e9, abs=1e-3)


def make_folders(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


VERSIONS = [f"pocket-rl-{step:05d}-{digest}" for step, digest in enumerate(("c3", "a1", "f0", "b2", "00"))]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(0, VERSIONS), (1, VERSIONS[-1:]), (3, VERSIONS[-3:]), (5, VERSIONS), (9, VERSIONS)],
)
def test_only_the_oldest_versions_go(tmp_path: Path, keep: int, expected: list[str]) -> None:
    make_folders(tmp_path, VERSIONS[::-1])
    publishing.prune(tmp_path, keep)
    assert left(tmp_path) == expected


def test_a_version_that_is_being_written_is_not_counted(tmp_path: Path) -> None:
    make_folders(tmp_path, [".partial", *VERSIONS[:2]])
    publishing.prune(tmp_path, 1)
    assert left(tmp_path) == [".partial", VERSIONS[1]]
