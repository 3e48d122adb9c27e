from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from agentiad.v1 import trajectory_pb2 as pb
from services.policy.prompt import Pixels, Prompt, image_digest, make_prompt, suffix_after, turn_key
from services.vlm.render import Chunk, ImageChunk, Renderer, TokenChunk
from tests.policy.conversations import make_image, make_reference


def tokens(*ids: int) -> TokenChunk:
    return TokenChunk(ids)


def keys(*chunks: Chunk) -> list[bytes]:
    return [boundary.key for boundary in make_prompt(chunks).boundaries]


IMAGE, OTHER = ImageChunk(make_image(1)), ImageChunk(make_image(2))


def test_a_boundary_is_named_by_the_content_alone() -> None:
    cuts = [keys(tokens(1, 2, 3, 4)), keys(tokens(1), tokens(2, 3), tokens(4)), keys(tokens(1, 2), tokens(3, 4))]
    assert len({cut[-1] for cut in cuts}) == 1
    assert cuts[2][1] in cuts[1] or cuts[1][2] in cuts[2]


def test_different_prompts_have_different_names() -> None:
    # The digest of an image written out as ids, as a caller could.
    digest = image_digest(IMAGE.image)
    posing = [int.from_bytes(digest[i : i + 4], "little", signed=True) for i in range(0, 32, 4)]
    ends = [
        keys(*chunks, tokens(9))[-1]
        for chunks in (
            [], [tokens(1)], [tokens(1, 2)], [tokens(2, 1)], [IMAGE], [OTHER], [IMAGE, OTHER], [tokens(1), IMAGE],
            [tokens(*(abs(id) for id in posing))],
        )
    ]  # fmt: skip
    assert len(set(ends)) == len(ends)


def test_a_reference_and_its_content_are_the_same_image(tmp_path: Path) -> None:
    reference = make_reference(tmp_path / "picture.png", 1)
    assert image_digest(reference) == image_digest(make_image(1))


@pytest.mark.parametrize("sha256", ["", "zz", "abcd", "é" * 64])
def test_a_reference_without_a_digest_is_refused(sha256: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        image_digest(pb.Image(reference=pb.ImageReference(uri="file:///x", sha256=sha256)))


def test_prefixes_are_stored_before_images_and_at_the_end() -> None:
    prompt = make_prompt([tokens(1), tokens(2, 3), IMAGE, OTHER, tokens(4), tokens(5)])
    assert [b.chunk for b in prompt.boundaries if b.store] == [2, 3, 6]


def test_a_generated_turn_is_found_in_the_next_prompt() -> None:
    prompt = make_prompt([tokens(1, 2)])
    said = (7, 8, 9)
    longer = make_prompt([tokens(1, 2), tokens(*said), tokens(4)])
    # The last id was never read, so the turn is stored without it.
    assert turn_key(prompt, said[:-1]) in [boundary.key for boundary in longer.boundaries]


@pytest.mark.parametrize("chunks", [[], [IMAGE], [tokens(1), IMAGE]])
def test_there_must_be_a_token_to_continue_from(chunks: list[Chunk]) -> None:
    with pytest.raises(ValueError, match="end in text"):
        make_prompt(chunks)


@pytest.fixture(scope="module")
def renderer(tiny_checkpoint: Path) -> Renderer:
    return Renderer.from_checkpoint(tiny_checkpoint)


def make_pixels(prompt: Prompt) -> Prompt:
    for index, _ in prompt.images_from(None):
        prompt.pixels[index] = Pixels(torch.zeros(8, 2), torch.tensor([[1, 2, 4]]))
    return prompt


def test_a_suffix_is_the_rest_of_the_prompt(renderer: Renderer) -> None:
    prompt = make_pixels(make_prompt([tokens(1, 2), IMAGE, tokens(3, 4, 5), OTHER, tokens(6)]))
    pad = [renderer.image_token_id] * 2
    whole = suffix_after(prompt, None, renderer)
    assert whole.ids == [1, 2, *pad, 3, 4, 5, *pad, 6]
    assert [count for _, count in whole.stores] == [2, 7, 10]
    lengths = {(0, 1): 1, (1, 0): 2, (2, 0): 4, (2, 2): 6, (3, 0): 7, (4, 0): 9}
    for boundary in prompt.boundaries:
        suffix = suffix_after(prompt, boundary, renderer)
        start = lengths.get((boundary.chunk, boundary.offset), 9)  # the end: the last id is read again
        assert suffix.ids == whole.ids[start:]
        assert len(suffix.images) == sum(map(len, [prompt.images_from(boundary)]))
        expected = [(key, count - start) for key, count in whole.stores if count > start]
        assert suffix.stores == (expected if boundary is not prompt.boundaries[-1] else [])


def test_boundaries_ascend() -> None:
    prompt = make_prompt([tokens(1, 2), IMAGE, tokens(3)])
    places = [(boundary.chunk, boundary.offset) for boundary in prompt.boundaries]
    assert all(left <= right for left, right in itertools.pairwise(places))
