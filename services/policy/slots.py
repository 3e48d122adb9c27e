"""The running batch's keys and values: preallocated slots, so that a step writes one token a row and copies nothing.

Row i of the batch lives in slot i. Rows have different lengths; what lies beyond a row's length is stale but finite,
and the attention mask hides it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache

from services.policy.prefix_cache import Node

# Slots grow by doubling, their length in steps of this many tokens.
_LENGTH_STEP = 128


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """What the attention layers of a model call `past_key_values`."""

    def __init__(self, config: Any, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(layers=[])
        heads = config.num_key_value_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._shape = (config.num_hidden_layers, heads, head_size)
        self._dtype, self._device = dtype, device
        self.clear()

    def clear(self) -> None:
        """Forgets all rows and gives their memory back."""
        self._kv = self._allocate(1, _LENGTH_STEP)
        self._window = (slice(0, 0), 0)
        self._target: tuple[torch.Tensor, ...] = ()

    def reserve(self, slots: int, length: int) -> None:
        """Makes room for `slots` rows of `length` tokens; what is there stays."""
        old = self._kv
        have_slots, have_length = old.shape[2], old.shape[4]
        if slots <= have_slots and length <= have_length:
            return
        new_slots = have_slots if slots <= have_slots else max(slots, 2 * have_slots)
        self._kv = self._allocate(new_slots, max(have_length, -(-length // _LENGTH_STEP) * _LENGTH_STEP))
        self._kv[:, :, :have_slots, :, :have_length] = old

    def begin(self, rows: slice, positions: torch.Tensor) -> int:
        """The next forward is for the slots `rows` and writes token t of row r at `positions` [rows, tokens].

        Returns how many tokens of a slot the attention sees.
        """
        self._window = (rows, int(positions.max()) + 1)
        slots = torch.arange(rows.start, rows.stop, device=self._device)
        heads = torch.arange(self._kv.shape[3], device=self._device)
        self._target = (slots[:, None, None], heads[:, None], positions.to(self._device)[:, None])
        return self._window[1]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with [rows, heads, tokens, head size]; returns all that rows may attend to."""
        (rows, length), keys, values = self._window, self._kv[0, layer_idx], self._kv[1, layer_idx]
        keys[self._target] = key_states
        values[self._target] = value_states
        return keys[rows, :, :length], values[rows, :, :length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._window[1]

    def load(self, slot: int, node: Node, length: int) -> None:
        """Puts the first `length` tokens of a stored prefix into a slot."""
        for part in node.path():
            start = part.parent.length if part.parent else 0
            if start < length:
                stop = min(part.length, length)
                self._kv[:, :, slot, :, start:stop] = part.kv[..., : stop - start, :]

    def copy_out(self, slot: int, start: int, stop: int) -> torch.Tensor:
        """A copy of the tokens from `start` to `stop` of a slot: [2, layers, heads, tokens, head size]."""
        return self._kv[:, :, slot, :, start:stop].clone()

    def move(self, source: int, target: int, length: int) -> None:
        self._kv[:, :, target, :, :length] = self._kv[:, :, source, :, :length]

    def _allocate(self, slots: int, length: int) -> torch.Tensor:
        layers, heads, head_size = self._shape
        # Zeros: a stale NaN would pass through the mask (0 · NaN is NaN).
        return torch.zeros(2, layers, slots, heads, length, head_size, dtype=self._dtype, device=self._device)
