"""Every choice of a training run, in one typed object a kind of run, with why; where a trainer finds the services."""

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.chassis.settings import Address, BusSettings, ImageSettings
from services.reward.presets import parse
from services.trainer.advantage import Scale


class TokenWeights(BaseModel):
    """How much each kind of token of a reply counts. Most tokens are habit; a few carry what was seen."""

    model_config = ConfigDict(frozen=True)

    verdict: float = 4.0  # the raw score of an inspection is read there
    coordinate: float = 1.5
    type: float = 1.5
    word: float = 0.5  # thoughts and format, learnt within the first hundred steps


EVEN = TokenWeights(verdict=1.0, coordinate=1.0, type=1.0, word=1.0)

# What differs from the defaults below, which make pocket.
PRESETS: dict[str, dict[str, object]] = {
    "pocket": {},
    # A third of the steps: a policy that has the habits and often errs, for RL to begin from. (Of a tenth it has no
    # habits yet, and its samples are noise.)
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


class TrainerSettings(BusSettings, ImageSettings):
    """Where RL finds the services, from the environment; the bus and the image store as for every service."""

    policy_address: Address = "127.0.0.1:50051"  # the policy that rollouts use: it follows NAME-candidate
    retrieval_address: Address = "127.0.0.1:50053"


# AgentIAD's own RL as its paper writes it (arXiv 2512.13671): 366 prompts three times (137 steps of 8 groups), group 8,
# temperature 1, lr 1e-6, clip 0.2, KL 0.1, rewards divided by their group's deviation. What it does not say: the rate
# stays as it is; the tower is frozen, as in its SFT.
_PAPER: dict[str, object] = {
    "prompts": 366, "steps": 137, "groups": 8, "group_size": 8, "hard_share": 0.0, "temperature": 1.0,
    "reward": "paper", "credit": "episode", "divide_by_std": True, "std_floor": 1e-4,
    "clip_low": 0.2, "clip_high": 0.2, "kl": 0.1,
    "adam_lr": 1e-6, "final_rate": 1.0, "freeze_vision": True, "max_new_tokens": 1024,
    "dtype": "bfloat16", "gradient_checkpointing": True, "micro_batch": 1,
    "keep_versions": 3, "version_deadline_s": 900.0, "group_deadline_s": 1800.0,
}  # fmt: skip

# What differs from the defaults below, which improve pocket. Of a node of 8 GPUs of 80 GB the trainer takes 2 (torchrun
# --nproc-per-node 2), or more to be faster; policies that roll out take the others. GPU memory, in GB of 10⁹ bytes,
# where B is 10⁹ parameters: 16 bytes for each that is trained (weight, gradient, Adam's two, in float32), 4 for each of
# the frozen tower and of KL's reference, spread over the ranks; and on each rank 20 for one episode: logits of 4,096
# tokens in float32 a few times over (15), recomputed activations, and the layers that are gathered.
RL_PRESETS: dict[str, dict[str, object]] = {
    "pocket": {},
    # 3.09 B x 16 + 0.67 B x 4 + 3.75 B x 4 = 67 GB: with the 20 too much for one GPU; on each of two 34 + 20.
    "qwen2.5-vl-3b": _PAPER,
    # 4.02 B x 16 + 0.42 B x 4 + 4.44 B x 4 = 84 GB: on each of two GPUs 42 + 20. With lora_rank=64 there is no second
    # model and little to train (18 GB + 2): one GPU is enough.
    "qwen3-vl-4b": _PAPER,
}


class RlSettings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    out: Path
    base: Path  # the checkpoint that RL begins with
    data: str = "procedural"  # or a data set whose samples have boxes
    seed: int = 0
    policy: str = "policy"  # versions are published as NAME-candidate
    steps: int = Field(default=120, ge=1)

    prompts: int = Field(default=600, ge=2)
    hard_share: float = Field(default=0.25, ge=0, le=1)  # of the groups: prompts that were mostly got wrong last time
    groups: int = Field(default=8, ge=1)  # a step
    group_size: int = Field(default=8, ge=2, le=1024)
    reward: str = "gated"  # preset, with ablations: see reward.proto
    temperature: float = Field(default=1.0, gt=0, le=2)  # importance weights are exact at 1 only
    max_turns: int = Field(default=6, ge=1, le=64)
    max_tool_calls: int = Field(default=3, ge=0)
    max_new_tokens: int = Field(default=128, ge=8)

    max_staleness: int = Field(default=1, ge=0)  # versions; 0: synchronous, rollouts wait for training
    publish_every: int = Field(default=2, ge=1)  # steps; Triton takes about one to load a version of pocket
    group_deadline_s: float = 300.0  # from the request to the last member; then the group is replaced
    version_deadline_s: float = 300.0  # from publishing a version to the policy serving it

    # episode: all tokens of an episode share its advantage, as in GRPO. parts: those after the verdict answer for the
    # rewards that are their doing (type, box), all before them for the others; each would only be noise to the other.
    credit: Literal["episode", "parts"] = "parts"
    weights: TokenWeights = EVEN  # times the advantage
    divide_by_std: bool = True  # of the group's rewards, plus this floor: prompts then weigh more alike
    std_floor: float = Field(default=0.1, gt=0)
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    importance_cap: float = Field(default=2.0, ge=1)
    kl: float = Field(default=0.0, ge=0)
    minibatches: int = Field(default=1, ge=1)  # updates a step
    micro_batch: int = Field(default=16, ge=1)  # trajectories a forward
    muon_lr: float = 0.0  # of matrices; 0: AdamW for all
    adam_lr: float = 1.5e-4
    warmup_updates: int = 5
    final_rate: float = Field(default=0.1, ge=0, le=1)  # the learning rate falls to this share of itself
    clip_norm: float = 1.0
    freeze_vision: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the forward; weights and updates are float32
    gradient_checkpointing: bool = False
    # 0: all weights are trained; else adapters on the language model alone, merged into what is served.
    lora_rank: int = Field(default=0, ge=0)

    checkpoint_every: int = Field(default=1, ge=1)  # steps
    keep_versions: int = Field(default=0, ge=0)  # checkpoint folders on disk; 0: all, for `agentiad policy promote`
    measured: int = Field(default=50, ge=0)  # held-out parts a category that base and last version play at the end
    threads: int = 0  # 0: all cores

    @field_validator("reward")
    @classmethod
    def _known_reward(cls, value: str) -> str:
        parse(value)
        return value

    @property
    def probe_verdicts(self) -> bool:
        """The reward asks what each tool call was worth."""
        preset = parse(self.reward)
        return preset.probes and "tools" not in preset.ablated

    @property
    def scale(self) -> Scale | None:
        return Scale(self.std_floor) if self.divide_by_std else None

    @property
    def tail(self) -> tuple[str, ...]:
        """Components of the reward that are credited to what is said after the verdict alone; see `credit`."""
        return parse(self.reward).tail if self.credit == "parts" else ()

    def identity(self) -> str:
        """All that decides the outcome, as JSON: a resumed run must have the same."""
        aside = {"out", "threads", "checkpoint_every", "keep_versions", "measured"}
        return self.model_dump_json(exclude=aside, indent=1)


def rl_preset(name: str, **changes: object) -> RlSettings:
    """The settings of a preset with `changes` on top. Raises KeyError, or pydantic's ValidationError."""
    return RlSettings.model_validate({**RL_PRESETS[name], **changes})
