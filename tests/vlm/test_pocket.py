"""Pocket: made from nothing, loaded by the Auto classes, and the checkpoint that ships."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.data import procedural
from services.data.layouts import LAYOUTS
from services.trainer import heldout
from services.vlm import pocket
from services.vlm.card import read_card
from services.vlm.checkpoint import load
from services.vlm.render import Renderer

SHIPPED = Path(pocket.__file__).parent / "checkpoints" / "pocket"
CORPUS = [protocol.SYSTEM_PROMPT, "Image 1: woven.", protocol.query_reply("Compare."), protocol.FORCED_ANSWER] * 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pocket")
    pocket.build(CORPUS, 0, pocket.Shape(vocabulary=600)).save(path)
    return path


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "Ünïcode ☃ 中文 🤖",
        "10.005 untrue",
        "a\n\n\tb\r",
        "<think></think>",
        "<|im_start|>user",
        "x" * 5000,
        "\x00",
    ],
)
def test_any_text_comes_back_as_it_was(folder: Path, text: str) -> None:
    renderer = Renderer.from_checkpoint(folder)
    assert renderer.decode(renderer.encode(text)) == text


def test_coordinates_and_verdicts_are_one_token_each(folder: Path) -> None:
    renderer = Renderer.from_checkpoint(folder)
    assert all(len(renderer.encode(word)) == 1 for word in (*pocket.COORDINATES, "true", "false"))
    box = protocol.format_box((0.1, 0.25, 0.5, 1.0))
    assert [renderer.decode([i]) for i in renderer.encode(box)][1::2] == ["0.10", "0.25", "0.50", "1.00"]


def test_a_forced_opening_splits_as_the_same_words_in_an_answer(folder: Path) -> None:
    renderer = Renderer.from_checkpoint(folder)
    whole = renderer.encode(protocol.FORCED_ANSWER + "true")
    assert whole == renderer.encode(protocol.FORCED_ANSWER) + renderer.encode("true")


def test_the_tokenizer_survives_saving(folder: Path) -> None:
    text = protocol.crop_reply("There.", (0.1, 0.2, 0.3, 0.4))
    built = pocket.train_tokenizer(CORPUS, 600)
    assert AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == built(text)["input_ids"]


def test_it_is_small_and_its_heads_are_of_a_size_that_vllm_serves(folder: Path) -> None:
    model = load(folder).model
    assert sum(parameter.numel() for parameter in model.parameters()) < 5_000_000
    assert model.config.text_config.head_dim in (32, 64)
    assert model.config.vision_config.hidden_size // model.config.vision_config.num_heads in (32, 64)


def test_the_shipped_checkpoint_loads_and_its_card_is_whole() -> None:
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 10 * 2**20
    card = read_card(SHIPPED)
    assert set(procedural.CATEGORIES) <= set(card.categories)
    assert card.comparison_view == pb.COMPARISON_VIEW_COMPOSITE
    # As measured when it was made, on parts that training never saw.
    assert card.quality["held_out_parts"] >= 300
    assert card.quality["balanced_accuracy"] >= 0.95
    assert card.quality["balanced_accuracy"] >= card.quality["balanced_accuracy_without_tools"] + 0.15
    assert load(SHIPPED).card.version == card.version


def test_the_shipped_policy_is_as_good_as_its_card_says() -> None:
    """On parts that neither training nor the card's measurement saw."""
    cases = heldout.cases(20, 20, first_seed=2 * procedural.TRAINING_VARIANTS)
    with_tools = heldout.play_all(SHIPPED, cases)
    without = heldout.play_all(SHIPPED, cases, heldout.NO_TOOLS)
    # 120 parts: 0.97 comes out below 0.93 once in a hundred times.
    assert heldout.balanced_accuracy(with_tools) >= 0.93
    assert heldout.balanced_accuracy(with_tools) >= heldout.balanced_accuracy(without) + 0.15
    # The tools are used where they help: comparisons on layouts, zooms on textures.
    assert all(protocol.QUERY in outcome.tools for outcome in with_tools if outcome.part.category in LAYOUTS)
    marked = [outcome for outcome in with_tools if outcome.part.category not in LAYOUTS and outcome.part.defects]
    assert sum(outcome.hit for outcome in marked) >= 0.9 * len(marked)
