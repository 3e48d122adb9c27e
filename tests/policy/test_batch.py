"""The running batch on a real tiny model: who joins, who leaves, and that the others do not notice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from agentiad.v1 import trajectory_pb2 as pb
from services.policy.batch import Batch
from services.policy.prefix_cache import PrefixCache
from services.policy.prompt import make_prompt, suffix_after
from services.policy.row import Row
from services.policy.sampling import random_numbers
from services.vlm import checkpoint
from services.vlm.checkpoint import LoadedPolicy
from tests.policy.conversations import system, user


@pytest.fixture(scope="module")
def policy(tiny_checkpoint: Path) -> LoadedPolicy:
    return checkpoint.load(tiny_checkpoint)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def make_row(policy: LoadedPolicy, text: str, max_new_tokens: int = 6) -> Row:
    prompt = make_prompt(policy.renderer.render([system("You inspect."), user(text)]))
    return Row(
        prompt=prompt, temperature=0, top_p=0, max_new_tokens=max_new_tokens, forced_ids=[], at_verdict=False,
        deliver=lambda _: None, boundary=None, node=None, suffix=suffix_after(prompt, None, policy.renderer),
        uniform=random_numbers(0, max_new_tokens),
    )  # fmt: skip


def alone(policy: LoadedPolicy, text: str, count: int) -> list[int]:
    batch, row = Batch(policy, PrefixCache(0), 1), make_row(policy, text, count)
    batch.join([row])
    while not batch.remove_ended():
        batch.step()
    return row.ids


def test_rows_leave_from_the_middle_and_the_others_go_on(policy: LoadedPolicy) -> None:
    batch = Batch(policy, PrefixCache(0), 8)
    lengths = {"a": 3, "bb": 9, "ccc": 1, "dddd": 12, "eeeee": 5}
    rows = [make_row(policy, text, count) for text, count in lengths.items()]
    batch.join(rows)
    left = list(batch.remove_ended())
    while batch.rows:
        batch.step()
        left += batch.remove_ended()
    assert [len(row.ids) for row in left] == sorted(lengths.values())
    for row, (text, count) in zip(rows, lengths.items(), strict=True):
        assert row.ids == alone(policy, text, count)


def test_a_cancelled_row_is_gone_after_the_step(policy: LoadedPolicy) -> None:
    batch = Batch(policy, PrefixCache(10**8), 8)
    rows = [make_row(policy, text, 20) for text in ("one", "two", "three")]
    batch.join(rows)
    rows[0].cancelled = True
    batch.step()
    assert batch.remove_ended() == []
    assert set(map(id, batch.rows)) == {id(rows[1]), id(rows[2])}


def test_there_are_never_more_rows_than_allowed(policy: LoadedPolicy) -> None:
    batch = Batch(policy, PrefixCache(0), 3)
    rows = [make_row(policy, str(number)) for number in range(5)]
    joining, waiting = batch.select(rows)
    assert (joining, waiting) == (rows[:3], rows[3:])
    batch.join(joining)
    assert batch.select(waiting) == ([], rows[3:])


def test_few_rows_wait_a_little_for_more(policy: LoadedPolicy) -> None:
    batch = Batch(policy, PrefixCache(0), 32)
    batch.join([make_row(policy, str(number), 50) for number in range(12)])
    late = make_row(policy, "late")
    waited = 0
    while not batch.select([late])[0]:
        waited += 1
    assert 1 <= waited <= 10
    # Two of them are a sixth of the batch, and go at once; as does one beside an empty batch.
    pair = [late, make_row(policy, "later")]
    assert batch.select(pair) == (pair, [])
    assert Batch(policy, PrefixCache(0), 32).select([late]) == ([late], [])


def test_of_a_group_one_goes_ahead_and_the_others_follow_together(policy: LoadedPolicy) -> None:
    batch = Batch(policy, PrefixCache(10**8), 8)
    group = [make_row(policy, "the same") for _ in range(4)]
    stranger = make_row(policy, "another")
    joining, waiting = batch.select([*group, stranger])
    assert joining == [group[0], stranger]
    batch.join(joining)
    joining, waiting = batch.select(waiting)
    assert (joining, waiting) == (group[1:], [])
    batch.join(joining)
    assert all(row.cached_tokens == row.prompt_tokens - 1 for row in group[1:])
    assert len({tuple(row.ids) for row in group}) == 1


def test_a_turn_is_stored_once_it_ended(policy: LoadedPolicy) -> None:
    cache = PrefixCache(10**8)
    batch, row = Batch(policy, cache, 1), make_row(policy, "hello", 5)
    batch.join([row])
    prompt_only = cache.size
    while not batch.remove_ended():
        batch.step()
    per_token = prompt_only // row.prompt_tokens
    assert cache.size == prompt_only + (len(row.ids) - 1) * per_token


def test_a_verdict_that_is_no_number_is_none(tiny_checkpoint: Path) -> None:
    broken = checkpoint.load(tiny_checkpoint)
    broken.model.get_output_embeddings().weight.fill_(torch.nan)
    row = make_row(broken, "hello")
    row.at_verdict = True
    Batch(broken, PrefixCache(0), 1).join([row])
    assert len(row.ids) == 1
    assert row.anomaly_probability is None


def test_a_finished_row_reports_why(policy: LoadedPolicy) -> None:
    batch, row = Batch(policy, PrefixCache(0), 1), make_row(policy, "hello", 2)
    batch.join([row])
    batch.step()
    assert row.finish_reason == pb.FINISH_REASON_LENGTH
