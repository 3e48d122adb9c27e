"""Examples from a folder that `data build` wrote are those that are built on the fly."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from agentiad.v1 import trajectory_pb2 as pb
from services.data import procedural, source
from services.data.build import BuildSettings, build
from services.data.readers import BadDataError
from services.data.words import Words
from services.trainer import dataset, sft
from services.trainer.batching import Example, PixelCodec, encode
from services.trainer.settings import TokenWeights
from services.vlm import pocket
from services.vlm.card import read_card
from services.vlm.render import Renderer
from tests.trainer.make_runs import TINY, make_pocket, make_recipe, make_settings


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("built") / "set"
    build(BuildSettings(out=folder, samples=12, seed=3))
    return str(folder)


def make_examples(recipe: dataset.Recipe, words: Words, renderer: Renderer) -> list[Example]:
    codec, names = PixelCodec(renderer.processor.image_processor), dataset.labels(recipe)
    examples = []
    for index in range(recipe.samples):
        demo = source.demonstration(index, source.Source(recipe.data, recipe.seed, recipe.view, words=words))
        images = [view.image for view in demo.views]
        marks = dataset.marks_of(demo, names)
        examples.append(encode(demo.trajectory, images, demo.imitate, marks, renderer, codec, TokenWeights()))
    return examples


def test_a_built_set_gives_the_examples_of_its_seed(built: str, tmp_path: Path) -> None:
    stored, fly = make_recipe(data=built), make_recipe()
    checkpoint = make_pocket(tmp_path / "pocket", fly)
    assert dataset.labels(stored) == dataset.labels(fly)
    assert dataset.categories(stored) == dataset.categories(fly) == procedural.CATEGORIES
    expected = make_examples(fly, Words.VARIED, Renderer.from_checkpoint(checkpoint))
    got = dataset.build(replace(stored, samples=15), checkpoint, tmp_path / "cache", 1, lambda _: None)
    assert len(got) == 15
    for mine, theirs in zip(got, [*expected, *expected[:3]], strict=True):  # after its last episode it begins again
        for name in ("ids", "weights", "patches", "grids", "marks"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name


def test_a_built_set_gives_the_demonstrations_of_its_seed_but_for_the_thoughts(built: str) -> None:
    for index in range(12):
        stored = dataset.demonstration(index, make_recipe(data=built))
        fly = dataset.demonstration(index, make_recipe())
        assert (stored.truth, stored.imitate) == (fly.truth, fly.imitate)
        assert stored.trajectory.verdict == fly.trajectory.verdict
        assert [view.marks for view in stored.views] == [view.marks for view in fly.views]


def test_a_set_for_another_view_is_refused(built: str) -> None:
    recipe = replace(make_recipe(data=built), view=pb.COMPARISON_VIEW_SIDE_BY_SIDE)
    with pytest.raises(BadDataError, match="another --view"):
        dataset.labels(recipe)
    with pytest.raises(BadDataError, match="single looks"):
        dataset.labels(make_recipe(data=built, single_pass=True))


def test_a_pocket_is_trained_on_a_built_set(built: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pocket, "Shape", lambda: TINY)
    out = sft.train(make_settings(tmp_path / "out", data=built), Console(quiet=True))
    assert tuple(read_card(out).categories) == procedural.CATEGORIES
