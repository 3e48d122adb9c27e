from __future__ import annotations

import torch

from services.policy.prefix_cache import Node, PrefixCache
from services.policy.prompt import Boundary

TOKEN_BYTES = 2 * 3 * 2 * 4 * 4


def make_node(key: str, parent: Node | None = None, tokens: int = 1) -> Node:
    length = (parent.length if parent else 0) + tokens
    return Node(key.encode(), parent, torch.zeros(2, 3, 2, tokens, 4), length, length)


def boundaries(*keys: str) -> list[Boundary]:
    return [Boundary(key.encode(), index, 0, store=True) for index, key in enumerate(keys)]


def stored(cache: PrefixCache, *keys: str) -> list[str]:
    return [key for key in keys if cache.get(key.encode())]


def test_the_longest_stored_prefix_is_found() -> None:
    cache = PrefixCache(10**6)
    root = make_node("a")
    cache.add(root)
    cache.add(make_node("ab", root))
    match = cache.match(boundaries("a", "ab", "abc"))
    assert match is not None
    assert match[1].key == b"ab"
    assert cache.match(boundaries("x", "xy")) is None


def test_a_common_beginning_is_held_once() -> None:
    cache = PrefixCache(10**6)
    root = make_node("system", tokens=100)
    for name in ("first", "second", "third"):
        cache.add(make_node(name, root, tokens=10))
    assert cache.size == 130 * TOKEN_BYTES


def test_the_limit_holds_and_the_unused_go_first() -> None:
    cache = PrefixCache(3 * TOKEN_BYTES)
    for key in ("a", "b", "c"):
        cache.add(make_node(key))
    cache.match(boundaries("a"))
    cache.add(make_node("d"))
    assert stored(cache, "a", "b", "c", "d") == ["a", "c", "d"]
    assert cache.size == 3 * TOKEN_BYTES


def test_no_branch_is_cut_below_its_leaves() -> None:
    cache = PrefixCache(4 * TOKEN_BYTES)
    root = make_node("a")
    middle = make_node("ab", root)
    leaf = make_node("abc", middle)
    for node in (root, middle, leaf):
        cache.add(node)
    cache.match(boundaries("a", "ab", "abc"))
    for key in ("x", "y", "z"):
        cache.add(make_node(key))
        present = stored(cache, "a", "ab", "abc")
        assert present == ["a", "ab", "abc"][: len(present)]


def test_an_evicted_ancestor_comes_back_with_its_descendant() -> None:
    cache = PrefixCache(2 * TOKEN_BYTES)
    root = make_node("a")
    cache.add(root)
    cache.add(make_node("x"))
    cache.add(make_node("y"))
    assert stored(cache, "a") == []
    cache.add(make_node("ab", root))
    assert stored(cache, "a", "ab", "x", "y") == ["a", "ab"]
    assert cache.size == 2 * TOKEN_BYTES


def test_without_memory_nothing_is_stored() -> None:
    cache = PrefixCache(0)
    cache.add(make_node("a"))
    assert not cache.enabled
    assert (stored(cache, "a"), cache.size) == ([], 0)
