"""What every engine and every host of engines offers, wherever it runs. One contract test suite holds for all.

Errors, from services.chassis.errors: BadInput (unreadable image, empty or too long prompt, bad sampling), NotFound (an
image is gone), Exhausted (the queue is full), Transient (the deadline has passed, the host is gone or closing).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard


class Engine(Protocol):
    """One loaded policy version."""

    @property
    def card(self) -> PolicyCard:
        """The version's card; `card.version` is what generations report."""
        ...

    async def generate(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deadline: float | None = None
    ) -> pb.Generation:
        """Continues the conversation by one turn. Cancelling the awaiting task frees its place at the next step.

        `deadline`: time.monotonic() seconds.
        """
        ...

    async def close(self) -> None:
        """Fails what is under way with Transient and gives the memory back."""
        ...


class Host(Protocol):
    """Where engines live."""

    async def open(self, checkpoint: Path, version: str) -> Engine:
        """Loads a checkpoint folder as `version` (empty: as its card says). Raises BadInput: it is no checkpoint."""
        ...

    async def close(self) -> None:
        """Closes what belongs to the host itself; engines are closed by whoever opened them."""
        ...
