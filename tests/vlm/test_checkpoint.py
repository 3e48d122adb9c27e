from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.vlm import checkpoint
from services.vlm.card import FILE_NAME, read_card, write_card
from tests.policy.checkpoints import SPECIAL, make_tiny_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


def test_a_loaded_policy_knows_its_tokens(folder: Path) -> None:
    policy = checkpoint.load(folder)
    ids = {token: policy.renderer.processor.tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    vocabulary = policy.vocabulary
    assert vocabulary.stop_ids == {ids["<|im_end|>"], ids["<|endoftext|>"]}
    rows = policy.model.get_output_embeddings().weight.shape[0]
    banned = {ids[token] for token in SPECIAL} - vocabulary.stop_ids
    assert set(vocabulary.banned_ids) == banned | set(range(policy.renderer.vocabulary_size, rows))
    decode = policy.renderer.decode
    assert {"true", " true", "t"} <= {decode([id]) for id in vocabulary.true_ids}
    assert {"false", " false", "f"} <= {decode([id]) for id in vocabulary.false_ids}
    assert not set(vocabulary.true_ids) & set(vocabulary.false_ids)
    assert {":", '":'} <= {decode([id]) for id in vocabulary.colon_ids}
    assert {" ", "\n"} <= {decode([id]) for id in vocabulary.blank_ids}


def test_the_digest_covers_the_weights_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name, content in (("b.safetensors", b"two"), ("a.safetensors", b"one"), ("config.json", b"{}")):
        (tmp_path / name).write_bytes(content)
    assert checkpoint.sha256_of(tmp_path) == hashlib.sha256(b"onetwo").hexdigest()


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"])
def test_a_torn_checkpoint_is_refused(tmp_path: Path, missing: str) -> None:
    make_tiny_checkpoint(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises((OSError, ValueError)):
        checkpoint.load(tmp_path)


def test_missing_weights_are_not_filled_with_random_ones(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.language_model.layers.0.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj"):
        checkpoint.load(tmp_path)


def test_a_foreign_checkpoint_is_named_after_its_weights(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path / "Qwen3-VL-Tiny")
    (tmp_path / "Qwen3-VL-Tiny" / FILE_NAME).unlink()
    card = checkpoint.load(tmp_path / "Qwen3-VL-Tiny").card
    digest = checkpoint.sha256_of(tmp_path / "Qwen3-VL-Tiny")
    assert card.version == f"Qwen3-VL-Tiny-{digest[:12]}"
    assert card.base_model == "Qwen3-VL-Tiny"
    assert card.comparison_view == pb.COMPARISON_VIEW_SIDE_BY_SIDE
    assert not card.categories


def test_a_card_is_read_as_it_was_written(tmp_path: Path) -> None:
    card = PolicyCard(
        version="7",
        base_model="pocket",
        categories=["bottle"],
        training_data=["procedural"],
        comparison_view=pb.COMPARISON_VIEW_COMPOSITE,
        quality={"balanced_accuracy": 0.97},
    )
    write_card(tmp_path, card)
    assert read_card(tmp_path) == card


def test_a_broken_card_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"versoin": "7"}')
    with pytest.raises(ValueError, match="versoin"):
        read_card(tmp_path)
