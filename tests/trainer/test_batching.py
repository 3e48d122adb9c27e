"""What is weighted, and that a batch holds exactly what the policy meets at work."""

import numpy as np
import pytest
import torch

from services.agent import protocol
from services.data.trajectories import Demonstration
from services.trainer import dataset
from services.trainer.batching import Example, PixelCodec, collate, encode, text_weights
from services.trainer.settings import TokenWeights
from services.vlm.render import Renderer
from tests.trainer.make_runs import make_pocket, make_recipe

WEIGHTS = TokenWeights(verdict=4, coordinate=1.5, type=2, word=0.5)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.from_checkpoint(make_pocket(tmp_path_factory.mktemp("pocket"), make_recipe()))


@pytest.fixture(scope="module")
def demos() -> list[Demonstration]:
    return [dataset.demonstration(index, make_recipe()) for index in range(12)]


def make_example(demo: Demonstration, renderer: Renderer) -> Example:
    codec = PixelCodec(renderer.processor.image_processor)
    images = [view.image for view in demo.views]
    return encode(demo.trajectory, images, demo.imitate, np.zeros((0, 6), np.float32), renderer, codec, WEIGHTS)


def test_only_the_policys_own_words_are_weighted(renderer: Renderer, demos: list[Demonstration]) -> None:
    for demo in demos:
        example = make_example(demo, renderer)
        weighted = renderer.decode(example.ids[example.weights > 0].tolist())
        own = [
            turn.message.segments[-1].text + "<|im_end|>"
            for turn, learn in zip(
                [turn for turn in demo.trajectory.turns if turn.HasField("generation")], demo.imitate, strict=True
            )
            if learn
        ]
        assert weighted == "".join(own)


def test_the_ids_are_those_of_the_renderer(renderer: Renderer, demos: list[Demonstration]) -> None:
    demo = demos[0]
    chunks = renderer.render([turn.message for turn in demo.trajectory.turns], open_end=False)
    grids = renderer.pixels([view.image for view in demo.views])["image_grid_thw"]
    assert make_example(demo, renderer).ids.tolist() == renderer.expand(chunks, grids)


def test_the_pixels_are_those_of_the_image_processor(renderer: Renderer, demos: list[Demonstration]) -> None:
    codec = PixelCodec(renderer.processor.image_processor)
    batch = collate([make_example(demo, renderer) for demo in demos[:3]], codec, 0, renderer.image_token_id)
    pixels = renderer.pixels([view.image for demo in demos[:3] for view in demo.views])
    assert torch.allclose(batch.inputs["pixel_values"], pixels["pixel_values"], atol=1e-5)
    assert torch.equal(batch.inputs["image_grid_thw"], pixels["image_grid_thw"])


def test_a_batch_predicts_each_weighted_token_from_the_one_before(
    renderer: Renderer, demos: list[Demonstration]
) -> None:
    examples = [make_example(demo, renderer) for demo in demos[:4]]
    codec = PixelCodec(renderer.processor.image_processor)
    batch = collate(examples, codec, 0, renderer.image_token_id)
    ids = batch.inputs["input_ids"].flatten()
    assert torch.equal(ids[batch.positions + 1], batch.targets)
    assert batch.weights.sum().item() == pytest.approx(sum(example.weights.sum() for example in examples), rel=1e-5)


def test_marks_count_their_images_over_the_batch(renderer: Renderer, demos: list[Demonstration]) -> None:
    first, second = (make_example(demo, renderer) for demo in demos[:2])
    mark = np.array([[0, 1, 0.1, 0.1, 0.2, 0.2]], np.float32)
    marked = Example(second.ids, second.weights, second.patches, second.grids, mark)
    batch = collate([first, marked], PixelCodec(renderer.processor.image_processor), 0, renderer.image_token_id)
    assert batch.marks[0, 0] == len(first.grids)


def test_weights_follow_what_a_token_carries(renderer: Renderer) -> None:
    text = '<think>Now.</think><answer>{"anomaly_present":true,"top_anomaly":"dent","bbox_2d":[0.10,0.20,0.30,0.40],'
    encoding = renderer.processor.plain.encode(text, add_special_tokens=False)
    by_token = dict(zip(encoding.tokens, text_weights(text, encoding.offsets, WEIGHTS), strict=True))
    assert by_token["true"] == 4
    assert by_token["0.30"] == 1.5
    assert by_token["</think>"] == 0.5
    assert 2 in by_token.values()


def test_the_verdict_of_a_forced_answer_is_weighted_too(renderer: Renderer) -> None:
    text = 'false,"top_anomaly":"none"'
    encoding = renderer.processor.plain.encode(text, add_special_tokens=False)
    assert text_weights(text, encoding.offsets, WEIGHTS)[0] == 4
    assert protocol.FORCED_ANSWER.endswith(protocol.VERDICT_MARKER)
