"""One learner on many ranks: `torchrun --nproc-per-node N -m services.trainer rl …`, a GPU each or all on the CPU.

    rank 0   bus, services, journal, disk ──▶ Team ──(a call with each rank's arguments)──▶ its own Learner
    others   follow ◀───────────────────────────────────────────────────────────────────┘   the same call on theirs

Each rank reads the base checkpoint; all else that a run does outside of its learner is done by rank 0 alone.
Invariants: all ranks make the same calls in the same order, with equally many forwards in each; a rank that fails ends
the others: rank 0 says so, or its connections close, and no wait is without a limit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from services.trainer.learner import Learner, Rollout

# Ranks compute the same things of about the same size: one that others wait for so long is stuck.
_COMPUTE_LIMIT = timedelta(minutes=10)
_END = "end"


class LeaderError(Exception):
    """Rank 0 ended by an error, which it tells itself."""


@dataclass(frozen=True)
class World:
    """The ranks of a run, seen from one of them."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mesh: DeviceMesh | None = None  # of all ranks; None: one rank
    control: dist.ProcessGroup | None = None  # for calls and metrics; always gloo

    def total(self, values: Sequence[float]) -> list[float]:
        """Sums over the ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def greatest(self, value: float) -> float:
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def _reduced(self, values: Sequence[float], operation: Any) -> list[float]:
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(numbers, operation, group=self.control)
        return [float(number) for number in numbers]

    def call(self, calls: Sequence[Call]) -> None:
        """By rank 0: gives each rank its call; its own is left to itself."""
        if self.size > 1:
            dist.scatter_object_list([None], list(calls), src=0, group=self.control)

    def called(self) -> Call:
        """By another rank: waits for its next call."""
        found: list[Any] = [None]
        dist.scatter_object_list(found, None, src=0, group=self.control)
        call: Call = found[0]
        return call


@dataclass(frozen=True)
class Call:
    """Of a learner's method, by name."""

    method: str
    arguments: tuple[Any, ...] = ()


@contextmanager
def joined(patience_s: float) -> Iterator[World]:
    """The ranks that torchrun started, while the block runs; when rank 0 leaves it, the others are told to end. Without
    torchrun there is one, on the CPU.

    `patience_s`: how long the others wait for rank 0's next call; rank 0 itself must give up sooner.
    """
    device = _device() if dist.is_torchelastic_launched() else torch.device("cpu")
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield World(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=_COMPUTE_LIMIT)
    size = dist.get_world_size()
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=patience_s))
    world = World(device, dist.get_rank(), size, init_device_mesh(device.type, (size,)), control)
    try:
        yield world
    except BaseException as error:
        if world.rank == 0:
            with suppress(RuntimeError):  # a rank that has gone already
                world.call([Call(_END, (f"{type(error).__name__}: {error}",))] * size)
        if device.type == "cpu":  # NCCL's end would wait for ranks that may be stuck
            dist.destroy_process_group()
        raise
    if world.rank == 0:
        world.call([Call(_END)] * size)
    dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


class Team:
    """A learner's methods, done by all ranks. On rank 0."""

    def __init__(self, learner: Learner, world: World) -> None:
        self._learner, self._world = learner, world

    def step(self, rollouts: Sequence[Rollout], progress: float) -> dict[str, float]:
        """As Learner.step."""
        shares = self._learner.shares(rollouts, self._world.size)
        metrics: dict[str, float] = self._all("learn", [(share, progress) for share in shares])
        return metrics

    def state(self) -> dict[str, Any]:
        """As Learner.state: what one rank would have, so that a run goes on with any number of ranks."""
        state: dict[str, Any] = self._all("state", [()] * self._world.size)
        return state

    def restore(self, state: dict[str, Any]) -> None:
        # The tensors themselves come by collectives.
        rest = {**state, "model": {}, "optimizers": None if state["optimizers"] is None else {}}
        self._all("restore", [(state,), *[(rest,)] * (self._world.size - 1)])

    def save(self, source: Path, out: Path) -> None:
        """As Learner.save."""
        self._all("save", [(source, out)] * self._world.size)

    def _all(self, method: str, arguments: Sequence[tuple[Any, ...]]) -> Any:
        mine = Call(_END)  # never carried out: rank 0 has its own arguments at hand
        self._world.call([mine, *(Call(method, own) for own in arguments[1:])])
        return getattr(self._learner, method)(*arguments[0])


def follow(learner: Learner, world: World) -> None:
    """Does what rank 0 calls for, until it ends. Raises LeaderError: it ended by an error."""
    while (call := world.called()).method != _END:
        getattr(learner, call.method)(*call.arguments)
    if call.arguments:
        raise LeaderError(call.arguments[0])


def shard(root: nn.Module, blocks: Iterable[nn.Module], world: World, dtype: torch.dtype) -> None:
    """FSDP2, in place, each block and the rest of `root` by itself: its weights lie in float32 in equal parts on the
    ranks, are gathered in `dtype` for a forward and a backward, and gradients are summed in float32. All ranks must
    hold the same weights before.
    """
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in (*blocks, root):
        # The root, too: a forward without a backward (reference, proximal) would leave its whole weights behind.
        sharded = fully_shard(module, mesh=world.mesh, mp_policy=policy, reshard_after_forward=True)
        # Each rank's loss is divided by the tokens of all: their sum is wanted, not FSDP's mean.
        sharded.set_gradient_divide_factor(1.0)
        # Gloo knows neither averages nor factors.
        sharded.set_force_sum_reduction_for_comms(True)


def clip(parameters: Iterable[Tensor], limit: float) -> float:
    """Scales the gradients to a norm of `limit` at most, over all ranks; the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on the CPU by name; empty on ranks other than 0. All ranks must call it."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return cast(dict[str, Tensor], get_model_state_dict(model, options=options))


def trained_state(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> dict[str, Any]:
    """Whole tensors on the CPU: of the weights that are trained, and of optimizers that have made a step. Ranks other
    than 0 get none. All must call it.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    begun = any(optimizer.state for optimizer in optimizers)
    return {
        "model": get_model_state_dict(model, options=options),
        # Torch would fill the state of a fresh optimizer by a step of its own, which Adam counts.
        "optimizers": get_optimizer_state_dict(model, optimizers, options=options) if begun else None,
    }


def restore_trained(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], state: dict[str, Any]) -> None:
    """Of fresh ones. Rank 0's state counts; the others' says only whether there is one of the optimizers."""
    many = dist.is_initialized()
    set_model_state_dict(
        model,
        state["model"],
        # Not strict: weights that are not trained stay those of the base.
        options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=many, strict=False),
    )
    if state["optimizers"] is not None:
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=many)
        set_optimizer_state_dict(model, optimizers, state["optimizers"], options=options)
