from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from transformers import Dinov2Config, Dinov2Model
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from services.vlm.encoder import VisionEncoder
from tests.policy.checkpoints import make_tiny_checkpoint


def make_vision_model(path: Path) -> Path:
    Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(path)
    CLIPImageProcessorPil().save_pretrained(path)
    return path


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_vl", "dinov2"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VisionEncoder:
    path = tmp_path_factory.mktemp("encoder")
    return VisionEncoder(
        make_vision_model(path) if request.param == "dinov2" else make_tiny_checkpoint(path, request.param)
    )


def make_part(x: int) -> Image.Image:
    part = Image.new("RGB", (96, 96), "white")
    ImageDraw.Draw(part).ellipse((x, 30, x + 30, 60), fill="black")
    return part


def test_vectors_have_length_one(encoder: VisionEncoder) -> None:
    vectors = encoder.embed([make_part(0), make_part(60), Image.new("L", (40, 200))])
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1], abs=1e-5)


def test_the_likest_picture_is_the_nearest(encoder: VisionEncoder) -> None:
    query, likest, other = encoder.embed([make_part(4), make_part(6), ImageOps.invert(make_part(4))])
    assert query @ likest > query @ other


def test_a_picture_alone_and_among_others(encoder: VisionEncoder) -> None:
    alone = encoder.embed([make_part(4)])
    among = encoder.embed([Image.new("RGB", (30, 70)), make_part(4)])
    assert alone[0] == pytest.approx(among[1], abs=1e-5)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        VisionEncoder(tmp_path)
