"""GRPO of the inspection episode by TRL's GRPOTrainer, on the CPU: the peer of services/trainer. Runs in .venv-trl.

    .venv-trl/bin/python -m tests.bench.trl_grpo --checkpoint DIR --parts DIR --steps 6 --groups 8 --out FILE.json

One update a step, on the trajectories of the policy as it is. Means of TRL that cannot train these episodes on a CPU:
`rollout_func` (TRL drops its images), transformers' continuous batching (text only), the asynchronous GRPO and vLLM's
server (their weights travel by NCCL).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset  # type: ignore[import-not-found]
from transformers import PrinterCallback, Qwen3VLProcessor, TrainerCallback
from transformers.processing_utils import ProcessorMixin
from trl import GRPOConfig, GRPOTrainer  # type: ignore[import-not-found]

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.reward.scoring import score
from services.vlm import checkpoint
from tests.bench.trl_episode import LIMITS, Block, Inspection, Parts

# All turns together and what the tools answer between them: five answers of about 100 tokens, 36 of them an image.
MAX_COMPLETION = LIMITS.max_turns * LIMITS.max_new_tokens + 5 * 128
REWARD_PRESET = "gated-tools"  # what needs no probes
# So low that a short run leaves the lengths of the episodes as they are.
LEARNING_RATE = 1e-5
# Sequences in a forward and backward pass; 64 trained slower a sequence than 32.
MICRO_BATCH = 32

# Pocket's own, with the tools' answers as user turns: the same ids as services.vlm.render gives. TRL refuses a template
# that does not write calls, but never feeds the policy a call so written.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + ('user' if message.role == 'tool' else message.role) + '\\n' }}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name }}{{ call.function.arguments }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class StillProcessor(Qwen3VLProcessor):  # type: ignore[misc]
    """Qwen's processor without its video part, which wants torchvision."""

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: str) -> None:
        self.image_token, self.image_token_id = "<|image_pad|>", tokenizer.convert_tokens_to_ids("<|image_pad|>")
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


def parse_response(tokenizer: Any, ids: Sequence[int], **_: object) -> Block:
    """What TRL takes a reply for: every one but an answer is a call of `act` with the whole reply, so that crops,
    comparisons and replies that cannot be read are all answered as the agent answers them.
    """
    reply = tokenizer.decode(ids).removesuffix(tokenizer.eos_token)
    if isinstance(protocol.parse(reply), protocol.Answer):
        return {"role": "assistant", "content": reply}
    call = {"name": "act", "arguments": {"reply": reply}}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}


@dataclass
class Step:
    """One update. Seconds by the wall; the rest are sums over the step's trajectories, groups' over its groups."""

    seconds: float = 0.0
    generation_seconds: float = 0.0  # the tools' included
    reward_seconds: float = 0.0
    trajectories: int = 0
    tokens: int = 0  # of the sequences as trained, images' placeholders included
    sampled_tokens: int = 0
    turns: int = 0
    images: int = 0
    answered: int = 0  # by the policy itself
    reward: float = 0.0
    groups_with_signal: int = 0  # not all of one reward


class Meter(TrainerCallback):  # type: ignore[misc]
    """What each step took and brought."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.now = Step()

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._since = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.now.seconds, self._since = now - self._since, now
        print(f"step {len(self.steps) + 1}: {dataclasses.asdict(self.now)}", flush=True)
        self.steps.append(self.now)
        self.now = Step()

    def summary(self) -> dict[str, float]:
        """Over all steps but the first, which warms up."""
        steps = self.steps[1:]
        total = {field.name: sum(getattr(step, field.name) for step in steps) for field in dataclasses.fields(Step)}
        training = total["seconds"] - total["generation_seconds"] - total["reward_seconds"]
        each = total["trajectories"]
        return {
            "trajectories_s": each / total["seconds"],
            "step_seconds": total["seconds"] / len(steps),
            "generation_seconds": total["generation_seconds"] / len(steps),
            "reward_seconds": total["reward_seconds"] / len(steps),
            "training_seconds": training / len(steps),
            **{
                name: total[name] / each
                for name in ("tokens", "sampled_tokens", "turns", "images", "answered", "reward")
            },
            "groups_with_signal": total["groups_with_signal"] / len(steps),
        }


class MeasuredTrainer(GRPOTrainer):  # type: ignore[misc]
    def __init__(self, meter: Meter, **settings: Any) -> None:
        self._meter = meter
        super().__init__(callbacks=[meter], **settings)

    def _generate(self, prompts: list[Any]) -> Any:
        started = time.perf_counter()
        generated = super()._generate(prompts)
        self._meter.now.generation_seconds += time.perf_counter() - started
        prompt_ids, completion_ids, sampled = generated[:3]
        self._meter.now.tokens += sum(map(len, prompt_ids)) + sum(map(len, completion_ids))
        self._meter.now.sampled_tokens += sum(map(sum, sampled))
        return generated


def make_reward(parts: Parts, meter: Meter, group_size: int) -> Callable[..., list[float]]:
    """TRL's reward function: a group's members come one after the other."""

    def reward(environments: Sequence[Inspection], completions: Sequence[list[Block]], **_: object) -> list[float]:
        started = time.perf_counter()
        episodes = [environment.episode for environment in environments]
        for played, completion in zip(episodes, completions, strict=True):
            played.conclude(_reply(completion[-1]))
        totals: list[float] = []
        for start in range(0, len(episodes), group_size):
            group = episodes[start : start + group_size]
            (part,) = {played.part for played in group}
            trajectories = [played.trajectory for played in group]
            rewards = [scored.total for scored in score(trajectories, parts.truth(part), REWARD_PRESET)]
            meter.now.groups_with_signal += len(set(rewards)) > 1
            totals += rewards
        meter.now.reward_seconds += time.perf_counter() - started
        _count(meter.now, [played.trajectory for played in episodes], totals)
        return totals

    return reward


def train(arguments: argparse.Namespace) -> dict[str, Any]:
    policy = checkpoint.load(arguments.checkpoint)
    own = policy.renderer.processor
    # TRL parses replies only where there is a template; parse_response stands in for transformers' reading of it.
    own.tokenizer.response_template = {}
    own.tokenizer.parse_response = partial(parse_response, own.tokenizer)
    parts, meter = Parts(arguments.parts), Meter()
    prompt = [{"role": "system", "content": protocol.SYSTEM_PROMPT}, {"role": "user", "content": ""}]
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            meter,
            model=policy.model,
            reward_funcs=make_reward(parts, meter, arguments.group_size),
            args=make_config(arguments, folder, policy.vocabulary),
            train_dataset=Dataset.from_list([{"prompt": prompt, "part": part} for part in range(len(parts.samples))]),
            processing_class=StillProcessor(own.image_processor, own.tokenizer, CHAT_TEMPLATE),
            environment_factory=partial(Inspection, parts, policy.card),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    # TRL tells the policy what a tool raised, and goes on.
    if any(row.get("tools/failure_frequency", 0) for row in trainer.state.log_history):
        raise RuntimeError("a tool raised: the episodes were not the agent's")
    return {
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
        "threads": torch.get_num_threads(),
        **{name: getattr(arguments, name) for name in ("steps", "groups", "group_size", "seed")},
        "summary": meter.summary(),
        "each_step": [dataclasses.asdict(step) for step in meter.steps],
    }


def make_config(arguments: argparse.Namespace, folder: str, vocabulary: checkpoint.Vocabulary) -> GRPOConfig:
    """One update a step, of all its trajectories; float32, as the agent's policy and its trainer."""
    batch = arguments.groups * arguments.group_size
    passes = next(n for n in range(-(-batch // MICRO_BATCH), batch + 1) if batch % n == 0)
    return GRPOConfig(
        output_dir=folder,
        seed=arguments.seed,
        max_steps=arguments.steps,
        num_generations=arguments.group_size,
        per_device_train_batch_size=batch // passes,
        gradient_accumulation_steps=passes,
        max_completion_length=MAX_COMPLETION,
        max_tool_calling_iterations=LIMITS.max_turns - 1,
        temperature=1.0,
        generation_kwargs={
            "max_new_tokens": LIMITS.max_new_tokens,
            # A sampled placeholder would ask for an image that is not there.
            "suppress_tokens": list(vocabulary.banned_ids),
        },
        loss_type="grpo",
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,  # TRL's default; it would compute every forward pass twice
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )


def _reply(message: Block) -> str:
    """The policy's words, of a message that TRL parsed."""
    calls = message.get("tool_calls")
    return str(calls[0]["function"]["arguments"]["reply"] if calls else message["content"])


def _count(step: Step, trajectories: Sequence[pb.Trajectory], rewards: Sequence[float]) -> None:
    step.trajectories += len(trajectories)
    step.turns += sum(turn.HasField("generation") for each in trajectories for turn in each.turns)
    step.images += sum(1 + sum(turn.observation.HasField("image") for turn in each.turns) for each in trajectories)
    step.answered += sum(each.stop_reason == pb.STOP_REASON_ANSWERED for each in trajectories)
    step.reward += sum(rewards)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True, help="what services.data.procedural.write_set wrote")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--groups", type=int, required=True, help="of one prompt each, a step")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.steps < 2:
        parser.error("--steps must be 2 at least: the first is not counted")
    result = train(arguments)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
