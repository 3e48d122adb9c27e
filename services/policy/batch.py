"""The running batch: rows join between steps, grow by one token a step, and leave when they are done.

Not thread-safe: the engine's thread owns it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from services.policy.prefix_cache import Node, PrefixCache
from services.policy.prompt import suffix_after, turn_key
from services.policy.row import Row
from services.policy.sampling import choose
from services.policy.slots import SlotCache
from services.vlm.checkpoint import LoadedPolicy

# Padded tokens that one forward of joining rows may hold: bounds its memory.
_MAX_PREFILL_TOKENS = 8192
# Beside a batch that runs, rows join once they are a sixth of it, or after six steps. With `pocket` on a CPU core a
# prompt with an image takes 17 ms when it is read alone and 10 ms among four; a step of the batch takes 9 ms.
_JOIN_SHARE = 6
_PATIENCE_STEPS = 6


class Batch:
    """At most `max_rows` rows of one policy."""

    def __init__(self, policy: LoadedPolicy, cache: PrefixCache, max_rows: int) -> None:
        self.rows: list[Row] = []
        self._patience = _PATIENCE_STEPS
        self._policy, self._cache, self._max_rows = policy, cache, max_rows
        self._core, self._head = policy.model.base_model, policy.model.get_output_embeddings()
        self._slots = SlotCache(policy.model.config.get_text_config(), policy.model.dtype, policy.device)
        self._banned = torch.tensor(policy.vocabulary.banned_ids, dtype=torch.long, device=policy.device)
        self._true = torch.tensor(policy.vocabulary.true_ids, device=policy.device)
        self._false = torch.tensor(policy.vocabulary.false_ids, device=policy.device)

    def select(self, waiting: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """(rows that may join now, rows that wait on), in the order of their arrival.

        Of several rows with the same new prompt (a group of rollouts) one goes ahead; the others find it stored a step
        later. Few rows wait a little for more to come: prompts are read far cheaper together.
        """
        if len(waiting) < len(self.rows) // _JOIN_SHARE and self._patience > 0:
            self._patience -= 1 if waiting else 0
            return [], list(waiting)
        self._patience = _PATIENCE_STEPS
        joining: list[Row] = []
        left: list[Row] = []
        prompts: set[bytes] = set()
        for row in waiting:
            key = row.prompt.boundaries[-1].key
            if len(self.rows) + len(joining) == self._max_rows or key in prompts:
                left.append(row)
                continue
            joining.append(row)
            if self._cache.enabled and self._cache.get(key) is None:
                prompts.add(key)
        return joining, left

    def join(self, joining: Sequence[Row]) -> None:
        """Reads the rows' prompts and chooses their first tokens."""
        for row in joining:
            self._match_again(row)
        for group in _groups(joining):
            logits = self._prefill(group)
            self._accept(group, logits)

    def step(self) -> None:
        """One more token for every row."""
        if not self.rows:
            return
        self._slots.reserve(len(self.rows), max(row.length for row in self.rows) + 1)
        lengths = torch.tensor([[row.length] for row in self.rows])
        ids = torch.tensor([[row.ids[-1]] for row in self.rows])
        positions = torch.tensor([[row.next_position] for row in self.rows])
        hidden = self._forward(slice(0, len(self.rows)), ids, lengths, positions.expand(3, -1, -1))
        for row in self.rows:
            row.length += 1
            row.next_position += 1
        self._accept(self.rows, self._head(hidden[:, -1]))

    def remove_ended(self) -> list[Row]:
        """Takes out finished and cancelled rows, stores the turns of the finished ones, and returns these."""
        finished = []
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if not (row.finish_reason or row.cancelled):
                continue
            if row.finish_reason and not row.cancelled:
                self._store_turn(slot, row)
                finished.append(row)
            last = self.rows.pop()
            if last is not row:
                self._slots.move(len(self.rows), slot, last.length)
                self.rows[slot] = last
        if not self.rows:
            self._slots.clear()
        return finished

    def _match_again(self, row: Row) -> None:
        """Another row may have stored more of this prompt while it waited."""
        match = self._cache.match(row.prompt.boundaries)
        if match is not None and (row.node is None or match[1].length > row.node.length):
            row.boundary, row.node = match
            row.suffix = suffix_after(row.prompt, row.boundary, self._policy.renderer)
        row.stored = row.node

    def _prefill(self, group: Sequence[Row]) -> torch.Tensor:
        """Logits [rows, vocabulary] after the last token of each prompt."""
        first, width = len(self.rows), max(len(row.suffix.ids) for row in group)
        starts = torch.tensor([[row.cached_tokens] for row in group])
        self._slots.reserve(first + len(group), int(starts.max()) + width)
        ids = torch.zeros(len(group), width, dtype=torch.long)
        positions = torch.zeros(3, len(group), width, dtype=torch.long)
        for index, row in enumerate(group):
            count = len(row.suffix.ids)
            ids[index, :count] = torch.tensor(row.suffix.ids)
            positions[:, index, :count] = self._positions(row)
            if row.node is not None:
                self._slots.load(first + index, row.node, row.cached_tokens)
        self.rows.extend(group)
        images = [image for row in group for image in row.suffix.images]
        pixels = {}
        if images:
            pixels["pixel_values"] = torch.cat([image.values for image in images]).to(self._policy.device)
            pixels["image_grid_thw"] = torch.cat([image.grid for image in images]).to(self._policy.device)
        slots = slice(first, first + len(group))
        hidden = self._forward(slots, ids, starts + torch.arange(width), positions, pixels)
        for index, row in enumerate(group):
            self._store_prompt(first + index, row, positions[0, index])
        last = [len(row.suffix.ids) - 1 for row in group]
        logits: torch.Tensor = self._head(hidden[torch.arange(len(group)), last])
        return logits

    def _forward(
        self,
        slots: slice,
        ids: torch.Tensor,
        places: torch.Tensor,
        positions: torch.Tensor,
        pixels: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Hidden states [rows, tokens, size] of `ids` [rows, tokens], which go to `places` of their slots.

        A token attends to everything of its slot up to its own place; what lies beyond is another turn's leftover.
        """
        device = self._policy.device
        seen = torch.arange(self._slots.begin(slots, places))
        mask = (seen <= places[:, :, None])[:, None].to(device)
        output = self._core(
            input_ids=ids.to(device),
            position_ids=positions.to(device),
            attention_mask=mask,
            past_key_values=self._slots,
            **(pixels or {}),
        )
        hidden: torch.Tensor = output.last_hidden_state
        return hidden

    def _positions(self, row: Row) -> torch.Tensor:
        """M-RoPE positions [3, tokens] of the row's suffix, by the model's own rule; sets the row's length and next
        position as they are after it."""
        positions: torch.Tensor
        count, cached = len(row.suffix.ids), row.cached_tokens
        if row.suffix.images:
            ids = torch.tensor([row.suffix.ids])
            kinds = (ids == self._policy.renderer.image_token_id).int()
            grids = torch.cat([image.grid for image in row.suffix.images])
            positions = self._core.get_rope_index(ids, mm_token_type_ids=kinds, image_grid_thw=grids)[0][:, 0]
        else:
            positions = torch.arange(count).expand(3, -1)
        if row.node is not None:
            # Zero, or one less than the node's length when only the last token is read again.
            positions = positions + (row.node.next_position - (row.node.length - cached))
        row.length = cached + count
        row.next_position = int(positions[0, -1]) + 1
        return positions

    def _accept(self, rows: Sequence[Row], logits: torch.Tensor) -> None:
        """Chooses each row's next token from `logits` [rows, vocabulary]."""
        logits = logits.float()
        distribution = logits.log_softmax(dim=-1)
        self._read_verdicts(rows, distribution)
        tokens = choose(
            logits.index_fill(-1, self._banned, -torch.inf),
            torch.tensor([row.temperature for row in rows], dtype=torch.float64, device=logits.device),
            torch.tensor([row.top_p for row in rows], dtype=torch.float64, device=logits.device),
            torch.tensor([row.uniform[len(row.ids)] for row in rows], dtype=torch.float64, device=logits.device),
        )
        chosen = distribution.gather(-1, tokens[:, None])[:, 0]
        for row, token, log_probability in zip(rows, tokens.tolist(), chosen.tolist(), strict=True):
            row.add(token, log_probability, self._policy.vocabulary, self._policy.renderer.decode)

    def _read_verdicts(self, rows: Sequence[Row], distribution: torch.Tensor) -> None:
        """P(true) / (P(true) + P(false)) for the rows whose next word is the verdict; none where it is no number."""
        asked = [index for index, row in enumerate(rows) if row.at_verdict]
        if not asked:
            return
        true = distribution[asked][:, self._true].logsumexp(dim=-1)
        false = distribution[asked][:, self._false].logsumexp(dim=-1)
        for index, probability in zip(asked, (true - false).sigmoid().tolist(), strict=True):
            if math.isfinite(probability):
                rows[index].anomaly_probability = probability

    def _store_prompt(self, slot: int, row: Row, positions: torch.Tensor) -> None:
        """`positions` [tokens]: the first M-RoPE coordinate of the suffix, which at a boundary is the next position."""
        if not self._cache.enabled:
            return
        cached = row.cached_tokens
        for key, count in row.suffix.stores:
            following = int(positions[count]) if count < len(row.suffix.ids) else row.next_position
            row.stored = self._store(slot, row.stored, key, cached + count, following)

    def _store_turn(self, slot: int, row: Row) -> None:
        # The last id was chosen but not read: its keys and values do not exist.
        if self._cache.enabled and len(row.ids) > 1:
            self._store(slot, row.stored, turn_key(row.prompt, row.ids[:-1]), row.length, row.next_position)

    def _store(self, slot: int, parent: Node | None, key: bytes, length: int, next_position: int) -> Node:
        node = self._cache.get(key)
        if node is None:
            kv = self._slots.copy_out(slot, parent.length if parent else 0, length)
            node = Node(key, parent, kv, length, next_position)
            self._cache.add(node)
        return node


def _groups(rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows that are read in one forward: of similar length, so that little of it is padding."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.suffix.ids), reverse=True):
        width = len(group[0].suffix.ids) if group else 0
        if group and (2 * len(row.suffix.ids) < width or (len(group) + 1) * width > _MAX_PREFILL_TOKENS):
            yield group
            group = []
        group.append(row)
    if group:
        yield group
