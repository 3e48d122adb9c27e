"""One request on its way through the engine."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from agentiad.v1 import trajectory_pb2 as pb
from services.policy.prefix_cache import Node
from services.policy.prompt import Boundary, Prompt, Suffix
from services.policy.threaded import Outcome
from services.vlm.checkpoint import Vocabulary

# The text after which the next word is the verdict.
_VERDICT = re.compile(r'"anomaly_present"\s*:\s*$')


@dataclass(eq=False)
class Row:
    """Waiting: prompt and wishes are set. Joined: it owns a slot of the batch, and grows by one id a step."""

    prompt: Prompt
    temperature: float
    top_p: float
    max_new_tokens: int
    # What the caller put into the open assistant message: its ids, and whether it asks for the verdict right away.
    forced_ids: list[int]
    at_verdict: bool
    deliver: Callable[[Outcome], None]
    # The longest stored prefix, and what is left to read after it.
    boundary: Boundary | None
    node: Node | None
    suffix: Suffix
    # One number in [0, 1) for each token of the turn.
    uniform: npt.NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    # The deepest stored prefix of this row: what it stores next hangs below.
    stored: Node | None = None
    # Set by the front when nobody waits any more; a bool is written atomically.
    cancelled: bool = False
    # Tokens whose keys and values are in the slot; the M-RoPE position of the next one.
    length: int = 0
    next_position: int = 0
    ids: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    anomaly_probability: float | None = None
    finish_reason: pb.FinishReason.ValueType = pb.FINISH_REASON_UNSPECIFIED

    @property
    def cached_tokens(self) -> int:
        """How many tokens of the prompt come out of the prefix cache; the last one is always read again."""
        if self.node is None or self.boundary is None:
            return 0
        whole = self.boundary.key == self.prompt.boundaries[-1].key
        return self.node.length - 1 if whole else self.node.length

    @property
    def prompt_tokens(self) -> int:
        return self.cached_tokens + len(self.suffix.ids)

    def add(
        self, token: int, log_probability: float, vocabulary: Vocabulary, decode: Callable[[list[int]], str]
    ) -> None:
        """Takes the next token; decides whether the turn ends and whether the verdict comes next."""
        self.ids.append(token)
        self.log_probabilities.append(log_probability)
        if token in vocabulary.stop_ids:
            self.finish_reason = pb.FINISH_REASON_STOP
        elif len(self.ids) == self.max_new_tokens:
            self.finish_reason = pb.FINISH_REASON_LENGTH
        else:
            self.at_verdict = verdict_follows(self.at_verdict, self.forced_ids + self.ids, vocabulary, decode)


def verdict_follows(before: bool, ids: list[int], vocabulary: Vocabulary, decode: Callable[[list[int]], str]) -> bool:
    """Whether the verdict comes after `ids`, all that the assistant's message holds; `before`: after all but the last.

    Looks at the whole text only where a colon may have come.
    """
    if ids[-1] in vocabulary.colon_ids:
        return asks_for_verdict(decode(ids))
    return before and ids[-1] in vocabulary.blank_ids


def asks_for_verdict(text: str) -> bool:
    """True where the next word of a reply is the verdict."""
    return _VERDICT.search(text) is not None
