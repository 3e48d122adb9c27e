"""What a policy is asked in RL: parts with their truth, put where every service can read them, and whose turn it is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from agentiad.v1 import retrieval_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.images import ImageStore
from services.data import procedural
from services.data.readers import BadDataError, read
from services.data.source import PROCEDURAL

if TYPE_CHECKING:
    # It exists for the type checker only.
    from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceAsyncStub

# Designs a category: enough that none is learnt by heart, few enough that their exemplars are embedded in seconds.
_VARIANTS = 25
# The last ones of training's own, which supervised fine-tuning draws once in a million parts.
_FIRST_VARIANT = procedural.TRAINING_VARIANTS - 1 - _VARIANTS
_EXEMPLARS_A_CALL = 32


@dataclass(frozen=True)
class Prompt:
    task: pb.Task
    truth: pb.GroundTruth


async def prepare(
    data: str, count: int, seed: int, store: ImageStore, retrieval: RetrievalServiceAsyncStub
) -> list[Prompt]:
    """`count` prompts of procedural parts (rounded up to equally many a category), or those of a data set's training
    split (`count` at most), with their pictures in `store` and their normal parts in the exemplar library. The same
    arguments give the same prompts.

    Raises BadDataError: the data set has no anomalous or no normal sample with known truth.
    """
    exemplars: dict[str, dict[str, pb.ImageReference]] = defaultdict(dict)
    prompts = []
    for image, category, defects, normal in _parts(data, count, seed):
        truth = pb.GroundTruth(anomaly_present=bool(defects))
        for kind, box in defects:
            truth.defects.add(type=kind, box=pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3]))
        prompts.append(Prompt(pb.Task(image=pb.Image(reference=store.put(image)), category=category), truth))
        if normal is not None:
            reference = store.put(normal)
            exemplars[category][reference.sha256] = reference
    if len({prompt.truth.anomaly_present for prompt in prompts}) < 2:
        raise BadDataError(f"{data} does not hold both normal and anomalous training samples")
    for category, references in exemplars.items():
        images = list(references.values())
        for first in range(0, len(images), _EXEMPLARS_A_CALL):
            chunk = images[first : first + _EXEMPLARS_A_CALL]
            await retrieval.AddExemplars(retrieval_pb2.AddExemplarsRequest(category=category, images=chunk))
    return prompts


_Part = tuple[Image.Image, str, list[tuple[str, procedural.Box]], Image.Image | None]


def _parts(data: str, count: int, seed: int) -> Iterator[_Part]:
    """(picture, category, defects, normal part to compare with)."""
    if data == PROCEDURAL:
        per_category = -(-count // len(procedural.CATEGORIES))
        variants = range(_FIRST_VARIANT, _FIRST_VARIANT + _VARIANTS)
        # Units of a seed's own, so that runs with different seeds see different parts of the same designs.
        parts = procedural.make_set(procedural.CATEGORIES, per_category, seed * 1_000_003 + 1, variants)
        for part in parts:
            normal = procedural.make_part(
                part.category, procedural.exemplar_seed(part.variant), part.variant, None, smudged=False
            )
            yield part.image, part.category, [(d.type, d.box) for d in part.defects], normal.image
        return
    samples = [sample for sample in read(Path(data)) if sample.split == "train" and sample.boxes_known]
    order = np.random.default_rng([seed, len(samples)]).permutation(len(samples))[:count]
    for sample in (samples[i] for i in order):
        defects = [(defect.type, defect.box) for defect in sample.defects]
        yield sample.open(), sample.category, defects, sample.open_reference()


class Curriculum:
    """Whose turn it is: each prompt once an epoch in an order of the seed's, and between them, with the probability
    `hard_share`, one of those that at least half of its last group got wrong (as EMIT does).
    """

    def __init__(self, count: int, seed: int, hard_share: float) -> None:
        self._count, self._seed, self._hard_share = count, seed, hard_share
        self._drawn = 0
        self._hard: list[int] = []

    def next(self, number: int) -> int:
        """The prompt of group `number`."""
        rng = np.random.default_rng([self._seed, number, 1])
        if self._hard and rng.uniform() < self._hard_share:
            return self._hard.pop(int(rng.integers(len(self._hard))))
        epoch, position = divmod(self._drawn, self._count)
        self._drawn += 1
        return int(np.random.default_rng([self._seed, epoch, 2]).permutation(self._count)[position])

    def learnt(self, prompt: int, rights: Sequence[bool]) -> None:
        """How a group on the prompt ended."""
        if 2 * sum(rights) <= len(rights) and prompt not in self._hard:
            self._hard.append(prompt)

    def state(self) -> dict[str, Any]:
        return {"drawn": self._drawn, "hard": list(self._hard)}

    def restore(self, state: dict[str, Any]) -> None:
        self._drawn, self._hard = state["drawn"], list(state["hard"])
