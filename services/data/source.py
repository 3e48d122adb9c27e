"""Where demonstrations come from: procedural parts, a data set on disk, or a folder that `data build` wrote.

The same source and index always give the same episode, whatever was asked for before.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from agentiad.v1 import trajectory_pb2 as pb
from services.data import demonstrations, plans, procedural
from services.data.demonstrations import StoredSet
from services.data.readers import BadDataError, Sample, read
from services.data.trajectories import Demonstration
from services.data.words import Words

PROCEDURAL = "procedural"


@dataclass(frozen=True)
class Source:
    """All that decides an episode besides its index."""

    data: str  # "procedural", or a path
    seed: int
    view: pb.ComparisonView.ValueType
    single_pass: bool = False
    words: Words = Words.PLAIN


def labels(source: Source) -> tuple[str, ...]:
    """What the vision pretext can find in a view: something from afar, something harmless, or a defect of a type."""
    if is_built(source.data):
        return _stored(source).labels
    if source.data == PROCEDURAL:
        kinds = {kind for kinds in procedural.DEFECTS.values() for kind in kinds}
    else:
        kinds = {defect.type for sample in _samples(source.data) for defect in sample.defects}
    return ("mark", "benign", *sorted(kinds))


def categories(source: Source) -> tuple[str, ...]:
    if is_built(source.data):
        return _stored(source).categories
    if source.data == PROCEDURAL:
        return procedural.CATEGORIES
    return tuple(sorted({sample.category for sample in _samples(source.data)}))


def demonstration(index: int, source: Source) -> Demonstration:
    """The index-th episode of a source; procedural parts are of a variant of their own, half of them anomalous.

    A built set begins again after its last episode. Raises BadDataError.
    """
    if is_built(source.data):
        stored = _stored(source)
        return stored[index % len(stored)]
    rng = np.random.default_rng([source.seed, index])
    shares = plans.Shares()
    if source.data == PROCEDURAL:
        subject = plans.subject_of_part(_part(index, rng), rng, shares)
    else:
        samples = _samples(source.data)
        subject = plans.subject_of_sample(samples[index % len(samples)], rng)
    if source.single_pass:
        return plans.single_pass(subject, rng, source.view, str(index))
    return plans.demonstrate(subject, rng, source.view, str(index), shares, source.words)


def is_built(data: str) -> bool:
    return data != PROCEDURAL and (Path(data) / demonstrations.MANIFEST).exists()


def _part(index: int, rng: np.random.Generator) -> procedural.Part:
    category = procedural.CATEGORIES[index % len(procedural.CATEGORIES)]
    kinds = procedural.DEFECTS[category]
    defect = str(rng.choice(kinds)) if rng.uniform() < procedural.ANOMALOUS_SHARE else None
    variant = int(rng.integers(procedural.TRAINING_VARIANTS - 1))
    return procedural.make_part(category, int(rng.integers(2**30)), variant, defect)


@lru_cache(maxsize=1)
def _samples(data: str) -> list[Sample]:
    """Those that can be learnt from: of the training split (MVTec's has no defects: of all), with known boxes."""
    samples = [sample for sample in read(Path(data)) if sample.boxes_known]
    training = [sample for sample in samples if sample.split == "train"]
    usable = training if any(sample.anomalous for sample in training) else samples
    if not any(sample.anomalous for sample in usable):
        raise BadDataError(f"{data} holds no anomalous sample with a known box")
    return usable


def _stored(source: Source) -> StoredSet:
    """The built set, where it is what the source asks for. Its seed and words were chosen when it was built."""
    stored = _opened(source.data)
    if stored.view != source.view:
        raise BadDataError(f"{source.data} was built with another --view than the checkpoint sees comparisons in")
    if source.single_pass:
        raise BadDataError(f"{source.data} holds episodes with tools, no single looks")
    return stored


@lru_cache(maxsize=1)
def _opened(data: str) -> StoredSet:
    return StoredSet(Path(data))
