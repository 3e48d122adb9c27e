"""Which demonstration a subject gets: the habits that SFT teaches, by shares.

What is done first never depends on the label where the first view cannot tell. Later steps follow what is seen.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.data import procedural
from services.data.layouts import LAYOUTS
from services.data.readers import Sample
from services.data.trajectories import Box, Demonstration, Demonstrator, Subject, random_place
from services.data.words import Words
from services.zoom.registration import register


@dataclass(frozen=True)
class Shares:
    """Probabilities; what is left over in a group is the group's plain way."""

    forced: float = 0.08  # verdicts asked for before the policy is done, so that a forced score means something
    miss: float = 0.08  # first crops that miss, with what mends them
    crop_then_query: float = 0.10  # of suspicious textures
    crop_clean: float = 0.08  # a look at a clean surface that needs none
    query_first: float = 0.85  # of parts that only a comparison can judge; the others look closer first
    query_first_with_landmark: float = 0.35  # where one place is known to matter, a look at it comes first more often
    zoom_difference: float = 0.85  # after a comparison that shows something
    zoom_no_difference: float = 0.25  # after one that shows nothing
    wrong_exemplar: float = 0.03  # retrieval brings another design: it cannot be aligned
    no_exemplar: float = 0.02
    strange_name: float = 0.05  # of a category: products that the policy has never heard of come too


def demonstrate(
    subject: Subject,
    rng: np.random.Generator,
    view: pb.ComparisonView.ValueType,
    name: str,
    shares: Shares,
    words: Words = Words.PLAIN,
) -> Demonstration:
    """One episode on the subject. `words` changes nothing but the thoughts."""
    inspector = Demonstrator(subject, rng, view, name, words)
    draw = rng.uniform()
    if draw < shares.forced:
        return _forced(inspector, rng)
    if not subject.visible:
        return _compare(inspector, rng, shares)
    target = _target(subject)
    if target is None:
        if rng.uniform() < shares.crop_clean:
            inspector.look(random_place(rng))
        return inspector.answer()
    if rng.uniform() < shares.miss:
        inspector.look(target, miss=True)
        inspector.look(target, again=True)
    else:
        inspector.look(target)
    if rng.uniform() < shares.crop_then_query:
        inspector.query()
    return inspector.answer()


def single_pass(
    subject: Subject, rng: np.random.Generator, view: pb.ComparisonView.ValueType, name: str
) -> Demonstration:
    """Look and answer, no tools: what the tools are measured against."""
    return Demonstrator(subject, rng, view, name).answer()


def subject_of_part(part: procedural.Part, rng: np.random.Generator, shares: Shares) -> Subject:
    """The part with a normal unit of its variant beside it; sometimes with a wrong one or none, as happens at work."""
    draw = rng.uniform()
    variant = part.variant + 1 if draw < shares.no_exemplar + shares.wrong_exemplar else part.variant

    def exemplar() -> Image.Image:
        return procedural.make_part(
            part.category, procedural.exemplar_seed(part.seed), variant, None, smudged=False
        ).image

    return Subject(
        part.image,
        _strange_name(rng) if rng.uniform() < shares.strange_name else part.category,
        tuple((defect.type, defect.box) for defect in part.defects),
        part.benign,
        part.landmark,
        None if draw < shares.no_exemplar else exemplar,
        visible=part.category not in LAYOUTS,
    )


def subject_of_sample(sample: Sample, rng: np.random.Generator) -> Subject:
    """A picture from disk. Where its reference can be aligned, the comparison is the way; else a closer look."""
    image, reference = sample.open(), sample.open_reference()
    visible = reference is None or not register(image, reference).registered
    defects = tuple((defect.type, defect.box) for defect in sample.defects)
    # No set marks what is benign, so a look at a normal surface goes anywhere: else a look would give the label away.
    benign = (random_place(rng),) if visible and not defects else ()
    return Subject(
        image, sample.category, defects, benign, None, None if reference is None else lambda: reference, visible
    )


def _strange_name(rng: np.random.Generator) -> str:
    letters = rng.choice(list("abcdefghijklmnopqrstuvwxyz_"), int(rng.integers(3, 14)))
    return "".join(letters)


def _forced(inspector: Demonstrator, rng: np.random.Generator) -> Demonstration:
    target = _target(inspector.subject)
    if rng.uniform() < 0.4:
        if inspector.subject.visible and target is not None:
            inspector.look(target)
        else:
            inspector.query()
    return inspector.forced_answer()


def _compare(inspector: Demonstrator, rng: np.random.Generator, shares: Shares) -> Demonstration:
    subject = inspector.subject
    if rng.uniform() < (shares.query_first if subject.landmark is None else shares.query_first_with_landmark):
        inspector.query()
    else:
        inspector.look(subject.landmark or random_place(rng))
        inspector.query()
        # Compared there and found nothing, but the place was any place: compare all of it.
        if inspector.aligned and subject.landmark is None and not inspector.sees_defect:
            inspector.look_at_all()
    if inspector.aligned and inspector.sees_all:
        share = shares.zoom_difference if subject.defects else shares.zoom_no_difference
        if rng.uniform() < share:
            target = _target(subject) or random_place(rng)
            missed = rng.uniform() < shares.miss
            if missed:
                inspector.look(target, miss=True)
            inspector.look(target, again=missed)
    return inspector.answer()


def _target(subject: Subject) -> Box | None:
    """What draws the eye: a defect, or else a benign mark."""
    if subject.defects:
        return max((box for _, box in subject.defects), key=lambda box: (box[2] - box[0]) * (box[3] - box[1]))
    return subject.benign[0] if subject.benign else None
