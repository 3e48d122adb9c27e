"""Small training runs for the tests: a narrow pocket, few parts."""

from pathlib import Path

from agentiad.v1 import trajectory_pb2 as pb
from services.trainer import dataset
from services.trainer.settings import SftSettings, TokenWeights
from services.vlm import pocket

TINY = pocket.Shape(
    vocabulary=700, image_side=48, vision_width=32, vision_depth=1, deepstack=(0,), width=64, depth=2, feed_forward=2
)


def make_recipe(samples: int = 12, single_pass: bool = False, data: str = dataset.PROCEDURAL) -> dataset.Recipe:
    return dataset.Recipe(data, samples, 3, single_pass, pb.COMPARISON_VIEW_COMPOSITE, TokenWeights())


def make_pocket(folder: Path, recipe: dataset.Recipe) -> Path:
    pocket.build(dataset.texts(recipe, 12), 0, TINY).save(folder)
    return folder


def make_settings(out: Path, **changes: object) -> SftSettings:
    values = {
        "samples": 12,
        "batch": 4,
        "epochs": 1.0,
        "pretext_steps": 2,
        "warmup_steps": 1,
        "threads": 1,
        "workers": 1,
    }
    return SftSettings.model_validate({"out": out, **values, **changes})
