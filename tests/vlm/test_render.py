"""Rendering, on both model families: the template's own text, prefix stability, verbatim ids, no injected turns."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.vlm.render import Chunk, ImageChunk, Renderer, TokenChunk
from tests.policy.checkpoints import TEMPLATE, make_tiny_checkpoint
from tests.policy.conversations import assistant, make_image, make_picture, system, user

THINKING_TEMPLATE = """\
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and not loop.last %}{{ message.content.split('</think>')[-1] }}\
{% elif message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
<think>
{% endif %}"""


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "thinking"])
def renderer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    path = tmp_path_factory.mktemp("checkpoint")
    make_tiny_checkpoint(path, "qwen3_vl" if request.param == "thinking" else request.param)
    if request.param == "thinking":
        (path / "chat_template.jinja").write_text(THINKING_TEMPLATE)
    return Renderer.from_checkpoint(path)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.from_checkpoint(make_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint")))


def text_of(renderer: Renderer, chunks: Sequence[Chunk]) -> str:
    return "".join("[image]" if isinstance(c, ImageChunk) else renderer.decode(c.ids) for c in chunks)


def make_conversation(seed: int, renderer: Renderer) -> list[pb.Message]:
    """Any legal conversation that ends in a user's message."""
    chance = random.Random(seed)
    words = ["bottle", " ", "\n", "{}", "<|im_end|>", "é", "zoom"]
    parts: list[str | pb.Image] = []
    messages = [system("".join(chance.choices(words, k=5)))] if chance.random() < 0.7 else []
    for _ in range(chance.randint(0, 3)):
        parts = [make_image(chance.randint(0, 3)) if chance.random() < 0.4 else chance.choice(words) for _ in range(3)]
        ids = [chance.randrange(0, 390) for _ in range(chance.randint(1, 6))]
        said: list[str | list[int]] = [ids + [renderer.end_of_turn_id] * (chance.random() < 0.8)]
        if chance.random() < 0.3:
            said.insert(0, '<answer>{"anomaly_present":')
        messages += [user(*parts), assistant(*said)]
    return [*messages, user(*parts, "x")]


@pytest.mark.parametrize("seed", range(40))
def test_a_longer_conversation_begins_with_the_shorter_and_what_was_generated(renderer: Renderer, seed: int) -> None:
    shorter = make_conversation(seed, renderer)
    generated = [random.Random(seed).randrange(0, 390) for _ in range(5)]
    if seed % 2:
        generated.append(renderer.end_of_turn_id)
    longer = [*shorter, assistant(generated), user("go on", make_image(9))]
    expected = [*renderer.render(shorter), TokenChunk(tuple(generated), assistant=True)]
    assert renderer.render(longer)[: len(expected)] == expected
    # A turn that was begun for the policy is continued in the same way.
    begun = [*shorter, assistant("<answer>")]
    expected = [*renderer.render(begun), TokenChunk(tuple(generated), assistant=True)]
    assert renderer.render([*shorter, assistant("<answer>", generated)])[: len(expected)] == expected


def test_it_is_the_text_of_the_models_own_template(plain: Renderer) -> None:
    messages = [
        system("Be brief."),
        user(make_image(1), "Image 1: bottle."),
        assistant("<think></think>looking"),
        user("Image 2:", make_image(2)),
    ]
    image = {"type": "image"}
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [image, {"type": "text", "text": "Image 1: bottle."}]},
        {"role": "assistant", "content": "<think></think>looking"},
        {"role": "user", "content": [{"type": "text", "text": "Image 2:"}, image]},
    ]
    expected = plain.processor.tokenizer.apply_chat_template(
        conversation, chat_template=plain.processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert text_of(plain, plain.render(messages)) == expected.replace("<|image_pad|>", "[image]")


def test_without_a_system_message_the_templates_own_comes_first(plain: Renderer) -> None:
    assert text_of(plain, plain.render([user("?")])).startswith("<|im_start|>system\nYou are a helpful assistant.")


def test_an_assistants_ids_go_in_verbatim(plain: Renderer) -> None:
    # Three ids that the tokenizer would never choose for this text.
    ids = [token for word in "true" for token in plain.encode(word)]
    assert ids != plain.encode("true")
    chunks = plain.render([user("?"), assistant(ids)])
    assert chunks[-1] == TokenChunk(tuple(ids), assistant=True)


@pytest.mark.parametrize(("text", "ending"), [("done", "done<|im_end|>\n"), ("", "<|im_end|>\n")])
def test_a_turn_without_its_end_gets_it(plain: Renderer, text: str, ending: str) -> None:
    rendered = text_of(plain, plain.render([user("?"), assistant(text), user("!")]))
    assert f"<|im_start|>assistant\n{ending}<|im_start|>user\n!" in rendered


def test_a_turn_with_its_end_gets_no_other(plain: Renderer) -> None:
    ids = [*plain.encode("done"), plain.end_of_turn_id]
    rendered = text_of(plain, plain.render([user("?"), assistant(ids), user("!")]))
    assert rendered.count("done<|im_end|>\n<|im_start|>user") == 1


def test_for_training_the_last_turn_is_closed(plain: Renderer) -> None:
    chunks = plain.render([user("?"), assistant("yes")], open_end=False)
    assert [chunk for chunk in chunks if isinstance(chunk, TokenChunk) and chunk.assistant] == [
        TokenChunk(tuple(plain.encode("yes")), assistant=True),
        TokenChunk((plain.end_of_turn_id,), assistant=True),
    ]


def test_what_the_assistant_says_is_marked(plain: Renderer) -> None:
    chunks = plain.render([user("a"), assistant("b"), user("c"), assistant("d")], open_end=False)
    said = [c.ids for c in chunks if isinstance(c, TokenChunk) and c.assistant]
    assert text_of(plain, [TokenChunk(ids) for ids in said]) == "b<|im_end|>d<|im_end|>"


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>user\n", "<|image_pad|>", "<|vision_start|>"])
def test_no_text_becomes_a_special_token(plain: Renderer, text: str) -> None:
    tokenizer = plain.processor.tokenizer
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    assert not special & set(plain.encode(text))
    assert plain.decode(plain.encode(text)) == text


def test_placeholders_are_as_many_as_the_image_has_tokens(plain: Renderer) -> None:
    pictures = [make_picture(1, (64, 64)), make_picture(2, (200, 40))]
    pixels = plain.pixels(pictures)
    chunks = plain.render([user(make_image(1), "and", make_image(2))])
    ids = plain.expand(chunks, pixels["image_grid_thw"])
    counts = [plain.image_tokens(grid) for grid in pixels["image_grid_thw"]]
    assert ids.count(plain.image_token_id) == sum(counts)
    assert len(pixels["pixel_values"]) == 4 * sum(counts)


def test_pixels_of_an_impossible_shape_are_refused(plain: Renderer) -> None:
    with pytest.raises(ValueError, match="aspect ratio"):
        plain.pixels([Image.new("RGB", (2000, 4))])


@pytest.mark.parametrize(
    "messages",
    [[], [pb.Message()], [pb.Message(role=pb.ROLE_USER, segments=[pb.Segment()])], [assistant([5000])]],
    ids=["none", "no role", "empty segment", "unknown id"],
)
def test_what_cannot_be_rendered(plain: Renderer, messages: list[pb.Message]) -> None:
    with pytest.raises(ValueError, match=r"."):
        plain.render(messages)


def test_a_template_in_the_processors_old_file_is_found(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat template"):
        Renderer.from_checkpoint(tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    assert Renderer.from_checkpoint(tmp_path).render([user("?")])
