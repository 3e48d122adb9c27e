"""Every choice of a training run, in one typed object, with why."""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class TokenWeights(BaseModel):
    """How much each kind of token of a reply counts. Most tokens are habit; a few carry what was seen."""

    model_config = ConfigDict(frozen=True)

    verdict: float = 4.0  # the raw score of an inspection is read there
    coordinate: float = 1.5
    type: float = 1.5
    word: float = 0.5  # thoughts and format, learnt within the first hundred steps


# What differs from the defaults below, which make pocket.
PRESETS: dict[str, dict[str, object]] = {
    "pocket": {},
    # A quarter of the steps: a policy that has the habits and often errs, for RL to begin from.
    "pocket-undertrained": {"samples": 5600, "epochs": 1.0, "pretext_steps": 500},
    # AgentIAD's own SFT of Qwen2.5-VL-3B (arXiv 2512.13671): tower frozen, lr 2e-5, warm-up 5 %, batch 16; AdamW.
    "pretrained": {
        "freeze_vision": True, "pretext_steps": 0, "muon_lr": 0.0, "adam_lr": 2e-5, "batch": 16, "warmup_steps": 50,
    },
}  # fmt: skip


class SftSettings(BaseModel):
    model_config = ConfigDict(frozen=True)

    data: str = "procedural"  # or a folder: manifest.jsonl, MVTec layout, or a folder a category
    out: Path
    base: Path | None = None  # a checkpoint to go on from; without one a fresh pocket is made
    seed: int = 0

    samples: int = 14_000  # episodes that are built (procedural: parts of as many variants)
    epochs: float = 2.0
    batch: int = Field(default=16, ge=1)
    single_pass: bool = False  # look and answer, no tools: only to measure what the tools are worth

    # The vision tower learns where and what marks are before the language model reads it: without this the whole does
    # not get off the ground in minutes. Kept as an auxiliary loss.
    pretext_steps: int = 600
    pretext_weight: float = 0.5

    # Muon for matrices reached in 300 s what AdamW alone did not in 362, in a study of a like model.
    muon_lr: float = 0.02  # 0: AdamW for all
    adam_lr: float = 2e-3  # embeddings, norms, biases, heads
    warmup_steps: int = 30
    freeze_vision: bool = False  # as AgentIAD's own SFT does with a pretrained tower
    clip_norm: float = 1.0

    weights: TokenWeights = TokenWeights()
    # Width of a coordinate's target, in units of the image: wide first, to pull from afar, then narrow, to be exact.
    sigma_first: float = 0.05
    sigma_last: float = 0.008

    threads: int = 0  # 0: all cores
    workers: int = 0  # processes that build episodes; 0: all cores
    checkpoint_minutes: float = 3.0

    @model_validator(mode="after")
    def _frozen_needs_base(self) -> Self:
        if self.freeze_vision and self.base is None:
            raise ValueError("a frozen vision tower needs a base: a fresh one has learnt nothing")
        return self

    def identity(self) -> str:
        """All that decides the outcome, as JSON: a resumed run must have the same."""
        return self.model_dump_json(exclude={"out", "threads", "workers", "checkpoint_minutes"}, indent=1)


def preset(name: str, **changes: object) -> SftSettings:
    """The settings of a preset with `changes` on top. Raises KeyError, or pydantic's ValidationError."""
    return SftSettings.model_validate({**PRESETS[name], **changes})
