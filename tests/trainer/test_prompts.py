"""What a policy is asked in RL, with the real image store and exemplar library; and whose turn it is."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.retrieval_pb2 import QueryExemplarsRequest
from services.cli.stack import Stack, embedded, every_exemplar
from services.data import procedural, textures
from services.data.readers import BadDataError
from services.trainer import prompts
from services.trainer.prompts import Curriculum, Prompt

CATEGORIES = len(procedural.CATEGORIES)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    async with embedded(folder, [], None, library=folder) as made:
        yield made


async def prepare(
    stack: Stack, data: str = prompts.PROCEDURAL, count: int = 2 * CATEGORIES, seed: int = 0
) -> list[Prompt]:
    return await prompts.prepare(data, count, seed, stack.images, stack.retrieval)


def make_picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (48, 64, 3), dtype=np.uint8))


def make_row(folder: Path, number: int, **changes: Any) -> dict[str, Any]:
    """Even ones are normal, odd ones have a scratch; each is the left half of a picture of its own."""
    make_picture(number).save(folder / f"{number}.png")
    make_picture(1000 + number).save(folder / f"{number}-normal.png")
    anomalous = number % 2 == 1
    row = {
        "image": f"{number}.png",
        "label": "anomalous" if anomalous else "normal",
        "category": "left" if number % 4 < 2 else "right",
        "crop": [0, 0, 32, 48],
        "defects": [{"type": "scratch", "box": [8, 12, 16, 24]}] if anomalous else [],
        "reference": f"{number}-normal.png",
    }
    return {**row, **changes}


def make_manifest(folder: Path, rows: Sequence[dict[str, Any]]) -> str:
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.mark.asyncio(loop_scope="module")
async def test_procedural_prompts_are_readable_and_true(stack: Stack) -> None:
    found = await prepare(stack)
    assert len(found) == 2 * CATEGORIES
    assert Counter(prompt.task.category for prompt in found) == dict.fromkeys(procedural.CATEGORIES, 2)
    assert sum(prompt.truth.anomaly_present for prompt in found) == CATEGORIES
    for prompt in found:
        assert stack.images.load(prompt.task.image).size == (textures.SIZE, textures.SIZE)
        assert bool(prompt.truth.defects) == prompt.truth.anomaly_present
        for defect in prompt.truth.defects:
            assert defect.type in procedural.DEFECTS[prompt.task.category]
            assert 0 <= defect.box.x_min < defect.box.x_max <= 1
            assert 0 <= defect.box.y_min < defect.box.y_max <= 1
    assert len({prompt.task.image.reference.sha256 for prompt in found}) == len(found)


@pytest.mark.asyncio(loop_scope="module")
async def test_a_prompt_tells_nothing_of_its_truth(stack: Stack) -> None:
    for prompt in await prepare(stack):
        assert prompt.task == pb.Task(image=prompt.task.image, category=prompt.task.category)


@pytest.mark.asyncio(loop_scope="module")
async def test_the_same_arguments_give_the_same_prompts_and_another_seed_others(stack: Stack) -> None:
    first, again, other = await prepare(stack), await prepare(stack), await prepare(stack, seed=1)
    assert first == again
    pictures = {prompt.task.image.reference.sha256 for prompt in first}
    assert not pictures & {prompt.task.image.reference.sha256 for prompt in other}


@pytest.mark.asyncio(loop_scope="module")
async def test_each_prompts_normal_part_is_what_a_query_finds(stack: Stack) -> None:
    """Of its own design: the library holds others of the category."""
    found = [prompt for prompt in await prepare(stack, count=4 * CATEGORIES) if prompt.task.category == "circuit"]
    for number, prompt in enumerate(found):
        asked = QueryExemplarsRequest(image=prompt.task.image, category="circuit", limit=1)
        (nearest,) = (await stack.retrieval.QueryExemplars(asked)).exemplars
        variant = prompts._FIRST_VARIANT + number
        normal = procedural.make_part("circuit", procedural.exemplar_seed(variant), variant, None, smudged=False)
        assert np.array_equal(
            np.asarray(stack.images.load(pb.Image(reference=nearest.image))), np.asarray(normal.image)
        )


@pytest.mark.asyncio(loop_scope="module")
async def test_no_exemplar_is_a_picture_that_is_judged(stack: Stack) -> None:
    judged = {prompt.task.image.reference.sha256 for prompt in await prepare(stack)}
    kept = {exemplar.image.sha256 async for exemplar in every_exemplar(stack.retrieval, "")}
    assert kept
    assert not judged & kept


@pytest.mark.asyncio(loop_scope="module")
async def test_a_data_set_gives_its_training_samples_with_their_boxes(stack: Stack, tmp_path: Path) -> None:
    rows = [make_row(tmp_path, number) for number in range(8)]
    rows += [make_row(tmp_path, 8, split="val"), make_row(tmp_path, 9, boxes_known=False)]
    found = await prepare(stack, make_manifest(tmp_path, rows), count=100)
    expected = {}
    for number in range(8):
        reference = stack.images.put(make_picture(number).crop((0, 0, 32, 48)))
        truth = pb.GroundTruth(anomaly_present=number % 2 == 1)
        if truth.anomaly_present:
            truth.defects.add(type="scratch", box=pb.Box(x_min=0.25, y_min=0.25, x_max=0.5, y_max=0.5))
        expected[reference.sha256] = ("left" if number % 4 < 2 else "right", truth)
    assert {p.task.image.reference.sha256: (p.task.category, p.truth) for p in found} == expected
    normals = {stack.images.put(make_picture(1000 + n).crop((0, 0, 32, 48))).sha256 for n in (0, 1, 4, 5)}
    assert {exemplar.image.sha256 async for exemplar in every_exemplar(stack.retrieval, "left")} == normals


@pytest.mark.asyncio(loop_scope="module")
async def test_of_a_large_data_set_a_seed_draws_some(stack: Stack, tmp_path: Path) -> None:
    data = make_manifest(tmp_path, [make_row(tmp_path, number, reference=None) for number in range(12)])
    first, again, other = [await prepare(stack, data, count=8, seed=seed) for seed in (0, 0, 1)]
    assert len(first) == 8
    assert first == again != other


@pytest.mark.asyncio(loop_scope="module")
async def test_an_anomalous_sample_without_a_box_is_not_passed_off_as_normal(stack: Stack, tmp_path: Path) -> None:
    rows = [make_row(tmp_path, number) for number in range(4)] + [make_row(tmp_path, 5, defects=[])]
    found = await prepare(stack, make_manifest(tmp_path, rows), count=100)
    assert len(found) == 4


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("number", [0, 1])
async def test_one_label_alone_teaches_nothing(stack: Stack, tmp_path: Path, number: int) -> None:
    data = make_manifest(tmp_path, [make_row(tmp_path, number + 2 * i) for i in range(3)])
    with pytest.raises(BadDataError, match="both normal and anomalous"):
        await prepare(stack, data)


def draw(curriculum: Curriculum, count: int, first: int = 0) -> list[int]:
    return [curriculum.next(number) for number in range(first, first + count)]


@given(st.integers(1, 20), st.integers(0, 1000), st.floats(0, 1))
def test_each_prompt_comes_once_an_epoch(count: int, seed: int, hard_share: float) -> None:
    found = draw(Curriculum(count, seed, hard_share), 3 * count)
    assert all(sorted(found[i * count : (i + 1) * count]) == list(range(count)) for i in range(3))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [draw(Curriculum(30, seed, 0.0), 60) for seed in (0, 1)]
    assert len({tuple(order[first : first + 30]) for order in orders for first in (0, 30)}) == 4


@pytest.mark.parametrize(
    ("rights", "hard"),
    [([False] * 4, True), ([True, False, False], True), ([True, True, False, False], True),
     ([True, True, False], False), ([True] * 4, False)],
)  # fmt: skip
def test_what_was_got_wrong_comes_again_once(rights: list[bool], hard: bool) -> None:
    curriculum, plain = Curriculum(10, 0, 1.0), Curriculum(10, 0, 1.0)
    curriculum.learnt(7, rights)
    curriculum.learnt(7, rights)  # two groups of it were in flight
    assert draw(curriculum, 6) == ([7, *draw(plain, 5)] if hard else draw(plain, 6))


def test_hard_ones_take_their_share_and_the_epoch_goes_on_between_them() -> None:
    curriculum, found, hard = Curriculum(50, 3, 0.25), list[int](), 0
    for number in range(2000):
        before = curriculum.state()["drawn"]
        found.append(curriculum.next(number))
        hard += curriculum.state()["drawn"] == before
        curriculum.learnt(found[-1], [found[-1] % 5 != 0])
    assert 0.2 < hard / 2000 < 0.3
    counts = Counter(found)
    assert min(counts[prompt] for prompt in range(0, 50, 5)) > max(counts[prompt] for prompt in range(1, 50, 5))
    assert min(counts.values()) >= (2000 - hard) // 50


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=40), st.integers(0, 40))
def test_a_restored_curriculum_goes_on_as_the_other_would(outcomes: list[tuple[bool, int]], cut: int) -> None:
    whole, broken = Curriculum(8, 5, 0.5), Curriculum(8, 5, 0.5)
    for number, (good, prompt) in enumerate(outcomes):
        if number == cut:
            state = json.loads(json.dumps(broken.state()))
            broken = Curriculum(8, 5, 0.5)
            broken.restore(state)
        assert whole.next(number) == broken.next(number)
        for curriculum in (whole, broken):
            curriculum.learnt(prompt, [good])
