"""Pictures → vectors whose cosine says how alike they look, for finding exemplars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d, normalize
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import logging

# A policy's tokens are averaged within each of 3 × 3 fields: where things lie matters, their last pixel does not.
_FIELDS = 3


class VisionEncoder:
    """The vision tower of a policy checkpoint, or any transformers vision model. Blocking; one call at a time.

    Raises OSError or ValueError when the folder `path` cannot be read.
    """

    def __init__(self, path: str | Path) -> None:
        logging.disable_progress_bar()  # it would draw over structured logs
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        self._processor = AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True)
        if config.model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and hasattr(config, "text_config"):
            policy = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, local_files_only=True)
            self._model: Any = policy.base_model
            self._model.language_model = None  # the larger part, and not needed
            self._encode = self._encode_by_policy
        else:
            self._model = AutoModel.from_pretrained(path, dtype=torch.float32, local_files_only=True)
            self._encode = self._encode_by_vision_model
        self._model.eval()

    def embed(self, images: Sequence[Image.Image]) -> npt.NDArray[np.float32]:
        """L2-normalised float32 [images, size]."""
        with torch.inference_mode():
            vectors = self._encode([image.convert("RGB") for image in images])
            unit: npt.NDArray[np.float32] = normalize(vectors.float(), dim=-1).numpy()
            return unit

    def _encode_by_policy(self, images: list[Image.Image]) -> torch.Tensor:
        """[images, 9 · token size]."""
        batch = self._processor(images=images, return_tensors="pt")
        grids = batch["image_grid_thw"]
        tokens = self._model.get_image_features(batch["pixel_values"], grids, return_dict=True).pooler_output
        merge = self._processor.merge_size
        fields = []
        for of_image, (_, height, width) in zip(tokens, grids.tolist(), strict=True):
            layout = of_image.reshape(height // merge, width // merge, -1).permute(2, 0, 1)
            fields.append(adaptive_avg_pool2d(layout, _FIELDS).flatten())
        return torch.stack(fields)

    def _encode_by_vision_model(self, images: list[Image.Image]) -> torch.Tensor:
        """[images, hidden size]: the model's own pooled vector where it has one, else the mean of its tokens."""
        batch = self._processor(images=images, return_tensors="pt")
        # Two-tower models (CLIP, SigLIP) want a text beside the picture unless only the picture's tower is asked.
        tower = getattr(self._model, "vision_model", self._model)
        output = tower(pixel_values=batch["pixel_values"])
        pooled: torch.Tensor | None = getattr(output, "pooler_output", None)
        return output.last_hidden_state.mean(dim=1) if pooled is None else pooled.flatten(1)
