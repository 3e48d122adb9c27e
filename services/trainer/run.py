"""An RL run on this machine: its folder, its id, its learner, its versions and its checkpoint.

OUT/versions/NAME   what the policy was after a step, ready to be served
OUT/work            the checkpoint that a killed run goes on from
"""

from __future__ import annotations

import os
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch

from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis.images import make_image_store
from services.data.readers import read
from services.data.source import PROCEDURAL
from services.trainer import folders
from services.trainer.encoding import RolloutEncoder
from services.trainer.folders import check_checkpoint
from services.trainer.learner import make_learner
from services.trainer.parallel import Team, World
from services.trainer.settings import RlSettings, TrainerSettings
from services.vlm.card import read_card, write_card
from services.vlm.checkpoint import sha256_of
from services.vlm.render import Renderer

VERSIONS = "versions"
SERVICES = "services"  # what services of this machine keep for this run alone


class Run:
    """Raises as `check`."""

    def __init__(self, settings: RlSettings, services: TrainerSettings, world: World, replay: str) -> None:
        self.settings, self.services = settings, services
        check(settings, replay)
        self.work = folders.occupy(settings.out, _identity(settings, replay), {SERVICES})
        self.run_id = _named(settings, self.work)
        self.renderer = Renderer.from_checkpoint(settings.base)
        learner = make_learner(settings, self.renderer, world)
        self.learner = learner if world.size == 1 else Team(learner, world)
        self.encoder = RolloutEncoder(self.renderer, make_image_store(services), settings.weights)
        self.step = 0
        self.version = ""
        self.trained: list[list[str]] = []  # group ids of each step

    def resume(self) -> dict[str, Any] | None:
        """Puts the last checkpoint in place; returns what `save` was given. None: there is no checkpoint."""
        path = self.work / "state.pt"
        if not path.exists():
            return None
        state = torch.load(path, weights_only=True)
        self.step, self.version, self.trained = state["step"], state["version"], state["trained"]
        self.learner.restore(state["learner"])
        torch.set_rng_state(state["random"])
        source: dict[str, Any] = state["source"]
        return source

    def save(self, source_state: dict[str, Any]) -> None:
        """Everything that a resumed run needs; whole or not at all."""
        state = {
            "step": self.step,
            "version": self.version,
            "trained": self.trained,
            "learner": self.learner.state(),
            "source": source_state,
            "random": torch.get_rng_state(),
        }
        partial = self.work / "state.partial"
        torch.save(state, partial)
        os.replace(partial, self.work / "state.pt")

    def make_version(self) -> Path:
        """The weights as they are now, as a checkpoint folder named after step and digest."""
        base = read_card(self.settings.base)
        partial = self.settings.out / VERSIONS / f".{uuid.uuid4().hex}"
        self.learner.save(self.settings.base, partial)
        self.version = f"{base.base_model}-rl-{self.step:05d}-{sha256_of(partial)[:8]}"
        card = PolicyCard()
        card.CopyFrom(base)
        card.version = self.version
        card.quality.clear()
        card.training_data.append(f"RL on {self.settings.data}, reward {self.settings.reward}, {self.step} steps")
        write_card(partial, card)
        if self.folder.exists():
            shutil.rmtree(partial)
        else:
            partial.rename(self.folder)
        return self.folder

    @property
    def folder(self) -> Path:
        """Of the current version."""
        return self.settings.out / VERSIONS / self.version


def check(settings: RlSettings, replay: str) -> None:
    """What can be refused before anything is started or written. Raises OccupiedError; BadInput: the base is no
    checkpoint; BadDataError: the data cannot be read.
    """
    check_checkpoint(settings.base)
    folders.check(settings.out, _identity(settings, replay), {SERVICES})
    if settings.data != PROCEDURAL and not replay:
        read(Path(settings.data))


def _identity(settings: RlSettings, replay: str) -> str:
    return f"{settings.identity()}\nreplay: {replay}\n"


def _named(settings: RlSettings, work: Path) -> str:
    """The run's id; what a kill left half-written is removed."""
    versions = settings.out / VERSIONS
    versions.mkdir(exist_ok=True)
    for torn in versions.glob(".*"):
        shutil.rmtree(torn)
    name = work / "run"
    if not name.exists():
        name.write_text(uuid.uuid4().hex[:12])
    return name.read_text()
