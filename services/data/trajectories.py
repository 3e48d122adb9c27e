"""Demonstrations for SFT: episodes as a good inspector would go through them, as agentiad.v1.Trajectory. Pure.

The agent's own state machine drives them and zoom's own functions draw the observations, so that a demonstration holds
exactly what the policy meets at work. Invariants: boxes and verdicts come from the truth; no text shown to the policy
depends on the label; a crop that misses on purpose is never imitated, only what mends it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import episode, protocol
from services.data import words
from services.data.words import Words
from services.zoom import compare, crop
from services.zoom.registration import Registration, register

Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)

_NO_TIME = timedelta()
# More than any plan takes; forcing a verdict sets the turn limit itself.
_LIMITS = pb.Limits(max_turns=99, max_tool_calls=99, max_new_tokens=256)
# Smallest side of a wish to look closer: with zoom's padding of 0.1 a side about the native resolution of a 96 px view.
_MIN_LOOK = 0.08


@dataclass(frozen=True)
class Mark:
    """Something to be seen in a view; for the vision pretext."""

    label: str
    box: Box  # normalised to the view


@dataclass(frozen=True)
class View:
    image: Image.Image
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Subject:
    """A picture with its truth, ready to be demonstrated."""

    image: Image.Image
    category: str
    defects: tuple[tuple[str, Box], ...]
    # Places that draw the eye on a normal part, and on any part besides its defects.
    benign: tuple[Box, ...] = ()
    # The one place that is worth a look on every part of this kind.
    landmark: Box | None = None
    # Makes or opens a normal part; called only when the inspector asks for one.
    exemplar: Callable[[], Image.Image] | None = None
    # The defects can be told from one picture, given a close look.
    visible: bool = True


@dataclass
class Demonstration:
    trajectory: pb.Trajectory
    truth: pb.GroundTruth
    # In the order in which the episode shows them.
    views: list[View] = field(default_factory=list)
    # For each assistant turn: shall the policy learn to say this?
    imitate: list[bool] = field(default_factory=list)


class Demonstrator:
    """Plays one episode on a subject. Each method is one thing that an inspector may do."""

    def __init__(
        self,
        subject: Subject,
        rng: np.random.Generator,
        view: pb.ComparisonView.ValueType,
        episode_id: str,
        words: Words = Words.PLAIN,
    ) -> None:
        self.subject, self.rng, self.words, self.looks = subject, rng, words, 0
        task = pb.Task(image=_claim("part", subject.image), category=subject.category)
        card = PolicyCard(categories=[subject.category], comparison_view=view)
        trajectory = episode.begin(episode_id, task, _LIMITS, pb.Sampling(), card)
        truth = pb.GroundTruth(anomaly_present=bool(subject.defects))
        for kind, box in subject.defects:
            truth.defects.add(type=kind, box=_proto(box))
        self.demonstration = Demonstration(trajectory, truth)
        self._exemplar: Image.Image | None = None
        self._registration: Registration | None = None
        self._show(subject.image, WHOLE, compared=False)

    @property
    def aligned(self) -> bool:
        """An exemplar was registered: views are comparisons from then on."""
        return self._registration is not None

    @property
    def sees_all(self) -> bool:
        return self._region == WHOLE

    @property
    def sees_defect(self) -> bool:
        kinds = {kind for kind, _ in self.subject.defects}
        return any(mark.label in kinds for mark in self.demonstration.views[-1].marks)

    def look(self, target: Box, miss: bool = False, again: bool = False) -> None:
        """Zooms on `target`, or with `miss` somewhere else, which the policy is not to imitate."""
        box = self._elsewhere(target) if miss else self._framed(target)
        say = words.check_difference if self.aligned and not again else words.look_again if again else words.look_closer
        self._say(protocol.crop_reply(say(self.rng, self.words), box), imitate=not miss)

    def look_at_all(self) -> None:
        self._say(protocol.crop_reply(words.whole(self.rng, self.words), (0.1, 0.1, 0.9, 0.9)))

    def query(self) -> None:
        self._say(protocol.query_reply(words.compare(self.rng, self.words, self.looks > 0)))

    def answer(self) -> Demonstration:
        refused = bool(self.demonstration.trajectory.turns[-1].observation.tool_error)
        thought = words.decide(self.rng, self.words, self.looks > 0, refused)
        self._say(protocol.answer_reply(thought, self._verdict()))
        return self.demonstration

    def forced_answer(self) -> Demonstration:
        """The verdict as it is asked for when a limit is reached: the opening of the turn is not the policy's own."""
        trajectory = self.demonstration.trajectory
        trajectory.limits.max_turns = sum(turn.HasField("generation") for turn in trajectory.turns)
        reply = protocol.answer_reply("", self._verdict())
        self._say(reply.removeprefix(protocol.FORCED_ANSWER))
        return self.demonstration

    def _say(self, text: str, imitate: bool = True) -> None:
        trajectory = self.demonstration.trajectory
        episode.add_generation(trajectory, pb.Generation(text=text), _NO_TIME)
        message = trajectory.turns[-1].message
        # A demonstration is text; its ids are the business of the checkpoint that learns from it.
        message.segments[-1].CopyFrom(pb.Segment(text=text))
        self.demonstration.imitate.append(imitate)
        match episode.next_step(trajectory):
            case episode.CropStep(box, exemplar):
                self._observe_crop(protocol.box_tuple(box), exemplar)
            case episode.QueryStep(box):
                self._observe_comparison(None if box is None else protocol.box_tuple(box))

    def _observe_crop(self, box: Box, exemplar: pb.ImageReference | None) -> None:
        if exemplar is not None:
            self._observe_comparison(box)
            return
        image, region = crop.crop(self.subject.image, box)
        self._observe(pb.Observation(region=_proto(region)), image, compared=False)

    def _observe_comparison(self, box: Box | None) -> None:
        if self.subject.exemplar is None:
            self._add(pb.Observation(tool_error=f"There is no normal image of {self.subject.category}."))
            return
        exemplar = self._exemplar = self._exemplar or self.subject.exemplar()
        found = self._registration or register(self.subject.image, exemplar)
        composite = self.demonstration.trajectory.comparison_view == pb.COMPARISON_VIEW_COMPOSITE
        view = compare.View.COMPOSITE if composite else compare.View.SIDE_BY_SIDE
        drawn = compare.compare(self.subject.image, exemplar, box, view, found)
        self._registration = found if found.registered else None
        observation = pb.Observation(
            region=_proto(drawn.region),
            exemplar=_claim("exemplar", exemplar).reference,
            registration_confidence=found.confidence,
            registered=found.registered,
        )
        # A picture of the exemplar alone has none of the part's marks.
        self._observe(observation, drawn.image, compared=True, marks=found.registered and composite)

    def _observe(self, observation: pb.Observation, image: Image.Image, compared: bool, marks: bool = True) -> None:
        self.looks += 1
        number = len(self.demonstration.views) + 1
        observation.image.CopyFrom(_claim(f"view-{number}", image).reference)
        self._add(observation)
        region = protocol.box_tuple(observation.region)
        self._show(image, region, compared, marks)

    def _add(self, observation: pb.Observation) -> None:
        episode.add_observation(self.demonstration.trajectory, observation, _NO_TIME)

    def _show(self, image: Image.Image, region: Box, compared: bool, marks: bool = True) -> None:
        self._region = region
        found: list[Mark] = []
        far = region == WHOLE and not compared
        # Of what only a comparison can judge, the first view shows nothing worth a mark.
        shown = marks and (self.subject.visible or not far)
        for kind, box in self.subject.defects if shown else ():
            if self.subject.visible or compared:
                found += _seen("mark" if far else kind, box, region)
        for box in self.subject.benign if shown else ():
            found += _seen("mark" if far else "benign", box, region)
        self.demonstration.views.append(View(image, tuple(found)))

    def _framed(self, target: Box) -> Box:
        side = max(target[2] - target[0], target[3] - target[1], _MIN_LOOK - 0.01) + self.rng.uniform(0.01, 0.04)
        shift = self.rng.uniform(-0.2, 0.2, 2) * side
        return _square((target[0] + target[2]) / 2 + shift[0], (target[1] + target[3]) / 2 + shift[1], side)

    def _elsewhere(self, target: Box) -> Box:
        while True:
            x, y = self.rng.uniform(0.08, 0.92, 2)
            if max(abs(x - (target[0] + target[2]) / 2), abs(y - (target[1] + target[3]) / 2)) > 0.3:
                return _square(float(x), float(y), self.rng.uniform(_MIN_LOOK, 0.12))

    def _verdict(self) -> pb.Verdict:
        if not self.subject.defects:
            return pb.Verdict(anomaly_present=False, top_anomaly="none")
        kind, box = max(self.subject.defects, key=lambda defect: _area(defect[1]))
        verdict = pb.Verdict(anomaly_present=True, top_anomaly=kind, box=_proto(box))
        verdict.visual_descriptions.append(words.describe(self.rng, kind, box))
        return verdict


def random_place(rng: np.random.Generator) -> Box:
    x, y = rng.uniform(0.1, 0.9, 2)
    return _square(float(x), float(y), 0.06)


def _square(x: float, y: float, side: float) -> Box:
    """A square box, moved inside the image, on whole hundredths: those are what a reply can say."""
    side = round(min(side, 1.0), 2)
    left = round(min(max(x - side / 2, 0.0), 1.0 - side), 2)
    top = round(min(max(y - side / 2, 0.0), 1.0 - side), 2)
    return (left, top, round(left + side, 2), round(top + side, 2))


def _seen(label: str, box: Box, region: Box) -> list[Mark]:
    """The mark in a view's own coordinates, if at least half of it lies in the view."""
    width, height = region[2] - region[0], region[3] - region[1]
    moved = (
        (box[0] - region[0]) / width, (box[1] - region[1]) / height,
        (box[2] - region[0]) / width, (box[3] - region[1]) / height,
    )  # fmt: skip
    x1, y1, x2, y2 = (min(max(value, 0.0), 1.0) for value in moved)
    visible = (x2 - x1) * (y2 - y1) >= 0.5 * _area(moved)
    return [Mark(label, (x1, y1, x2, y2))] if visible and x2 > x1 and y2 > y1 else []


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _proto(box: Box) -> pb.Box:
    return pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])


def _claim(name: str, image: Image.Image) -> pb.Image:
    # The pixels travel beside the trajectory, in `views`.
    reference = pb.ImageReference(uri=f"memory:{name}", media_type="image/png", width=image.width, height=image.height)
    return pb.Image(reference=reference)
