from __future__ import annotations

import torch
from transformers import PretrainedConfig

from services.policy.prefix_cache import Node
from services.policy.slots import SlotCache

CONFIG = PretrainedConfig(num_hidden_layers=2, num_key_value_heads=3, num_attention_heads=3, hidden_size=12)


def make_slots() -> SlotCache:
    return SlotCache(CONFIG, torch.float32, torch.device("cpu"))


def write(slots: SlotCache, rows: slice, positions: list[list[int]], value: float) -> torch.Tensor:
    """One forward of all layers; returns what the last layer may attend to."""
    places = torch.tensor(positions)
    slots.begin(rows, places)
    new = torch.full((len(positions), 3, places.shape[1], 4), float(value))
    for layer in range(2):
        keys, values = slots.update(new, new + 100, layer)
    assert torch.equal(values[keys != 0], keys[keys != 0] + 100)
    return keys[:, 0, :, 0]


def test_each_row_is_written_at_its_own_place() -> None:
    slots = make_slots()
    slots.reserve(2, 8)
    seen = write(slots, slice(0, 2), [[0, 1], [3, 4]], 1)
    assert seen.tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 1, 1]]


def test_growing_keeps_what_is_there() -> None:
    slots = make_slots()
    write(slots, slice(0, 1), [[0]], 5)
    slots.reserve(3, 1000)
    assert write(slots, slice(0, 3), [[1], [999], [0]], 6)[0, :3].tolist() == [5, 6, 0]


def test_a_prefix_comes_back_from_its_parts() -> None:
    slots = make_slots()
    slots.reserve(2, 8)
    for position in range(5):
        write(slots, slice(0, 1), [[position]], position + 1)
    root = Node(b"a", None, slots.copy_out(0, 0, 2), 2, 2)
    leaf = Node(b"b", root, slots.copy_out(0, 2, 5), 5, 5)
    slots.load(1, leaf, 4)
    assert write(slots, slice(1, 2), [[5]], 9)[0].tolist() == [1, 2, 3, 4, 0, 9]


def test_a_row_moves_with_all_its_tokens() -> None:
    slots = make_slots()
    slots.reserve(2, 4)
    write(slots, slice(1, 2), [[0, 1, 2]], 7)
    slots.move(1, 0, 3)
    assert write(slots, slice(0, 1), [[3]], 8)[0].tolist() == [7, 7, 7, 8]


def test_a_cleared_cache_holds_no_old_values() -> None:
    slots = make_slots()
    write(slots, slice(0, 1), [[0, 1, 2]], 7)
    slots.clear()
    assert write(slots, slice(0, 1), [[3]], 8)[0].tolist() == [0, 0, 0, 8]
