"""Keys and values of prefixes that were computed before, shared between the turns of an episode and between episodes.

A tree: each node holds the keys and values from its parent's end to its own, so prefixes with a common beginning share
its memory. Whoever is used makes its ancestors younger than itself; so the oldest node is always one without children,
and evicting from the old end never cuts a branch. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from services.policy.prompt import Boundary


@dataclass(frozen=True, eq=False)
class Node:
    """`kv` [2, layers, heads, tokens, head size]: the tokens from the parent's `length` to `length`."""

    key: bytes
    parent: Node | None
    kv: torch.Tensor
    # Tokens from the start of the prompt.
    length: int
    # The M-RoPE position of the token that follows.
    next_position: int

    @property
    def size(self) -> int:
        """Bytes."""
        return self.kv.numel() * self.kv.element_size()

    def path(self) -> Iterator[Node]:
        """This node, its parent, … up to the root."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


class PrefixCache:
    """At most `limit_bytes` of keys and values; 0 stores nothing."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._nodes: OrderedDict[bytes, Node] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    @property
    def enabled(self) -> bool:
        return self._limit > 0

    @property
    def size(self) -> int:
        """Bytes held."""
        return self._size

    def match(self, boundaries: Sequence[Boundary]) -> tuple[Boundary, Node] | None:
        """The last of `boundaries` (ascending) that is stored."""
        with self._lock:
            for boundary in reversed(boundaries):
                node = self._nodes.get(boundary.key)
                if node is not None:
                    self._touch(node)
                    return boundary, node
        return None

    def get(self, key: bytes) -> Node | None:
        with self._lock:
            return self._nodes.get(key)

    def add(self, node: Node) -> None:
        """Stores `node`; evicts what was not used for longest until the limit holds."""
        with self._lock:
            self._touch(node)
            while self._size > self._limit:
                _, evicted = self._nodes.popitem(last=False)
                self._size -= evicted.size

    def _touch(self, node: Node) -> None:
        # Child before parent. An ancestor that was evicted while a row still held it comes back with its descendant.
        for part in node.path():
            if part.key not in self._nodes:
                self._nodes[part.key] = part
                self._size += part.size
            self._nodes.move_to_end(part.key)
