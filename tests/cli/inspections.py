"""Inspections made by the real state machine, with pictures drawn by Pillow instead of services."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import episode, inspection, protocol
from services.chassis.errors import NotFound
from services.cli.drawing import Box

NORMAL = pb.Verdict(anomaly_present=False, top_anomaly="none")


def make_box(box: Box) -> pb.Box:
    return pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])


def make_verdict(kind: str, box: Box, *descriptions: str) -> pb.Verdict:
    return pb.Verdict(anomaly_present=True, top_anomaly=kind, box=make_box(box), visual_descriptions=descriptions)


def make_truth(kind: str, box: Box) -> pb.GroundTruth:
    return pb.GroundTruth(anomaly_present=True, defects=[pb.GroundTruth.Defect(type=kind, box=make_box(box))])


@dataclass
class Script:
    """An episode driven by hand; `images` is what `load` finds."""

    size: tuple[int, int] = (400, 400)
    category: str = "bolt"
    view: pb.ComparisonView.ValueType = pb.COMPARISON_VIEW_COMPOSITE
    known: bool = True
    name: str = "part.png"
    max_turns: int = 12
    images: dict[str, Image.Image] = field(default_factory=dict)

    def __post_init__(self) -> None:
        part = self._put(f"file:///parts/{self.name}", Image.new("RGB", self.size, "#808080"))
        card = PolicyCard(version="v1", categories=[self.category] if self.known else [], comparison_view=self.view)
        task = pb.Task(image=pb.Image(reference=part), category=self.category)
        limits = pb.Limits(max_turns=self.max_turns, max_tool_calls=12, max_new_tokens=64)
        self.trajectory = episode.begin("e", task, limits, pb.Sampling(), card)

    def load(self, reference: pb.ImageReference) -> Image.Image:
        if reference.uri not in self.images:
            raise NotFound(f"{reference.uri} is gone")
        return self.images[reference.uri]

    def say(self, text: str, probability: float | None = None) -> None:
        generation = pb.Generation(token_ids=[1], text=text, policy_version="v1", anomaly_probability=probability)
        episode.add_generation(self.trajectory, generation, timedelta(milliseconds=120))

    def crop(self, thought: str, box: Box, shown: Image.Image | None = None, exemplar: bool = False) -> None:
        """A zoom and its answer; without `shown`, a picture in one colour."""
        self.say(protocol.crop_reply(thought, box))
        self._answer(shown or Image.new("RGB", (224, 224), "#707070"), box, exemplar, registered=exemplar)

    def query(self, thought: str, box: Box, shown: Image.Image | None = None, registered: bool = True) -> None:
        """A comparison and its answer."""
        self.say(protocol.query_reply(thought))
        self._answer(shown or Image.new("RGB", (224, 224), "#707020"), box, True, registered)

    def answer(self, thought: str, verdict: pb.Verdict, probability: float) -> events_pb2.InspectionCompleted:
        self.say(protocol.answer_reply(thought, verdict), probability)
        return self.inspection()

    def inspection(self, review_band: float = 0.0) -> events_pb2.InspectionCompleted:
        image = self.trajectory.task.image.reference
        captured = events_pb2.ImageCaptured(event_id="e", line="l", category=self.category, image=image)
        rule = inspection.DecisionRule(0.5, review_band)
        return inspection.complete(captured, self.trajectory, rule, datetime.now(UTC))

    def _answer(self, shown: Image.Image, box: Box, exemplar: bool, registered: bool) -> None:
        reference = self._put(f"file:///seen/{len(self.trajectory.turns)}.png", shown)
        observation = pb.Observation(image=reference, region=make_box(box), registered=registered)
        if exemplar:
            normal = Image.new("RGB", self.size, "#00A0A0")
            observation.exemplar.CopyFrom(self._put("file:///normals/1.png", normal))
            observation.registration_confidence = 0.9
        episode.add_observation(self.trajectory, observation, timedelta(milliseconds=30))

    def _put(self, uri: str, image: Image.Image) -> pb.ImageReference:
        self.images[uri] = image
        return pb.ImageReference(uri=uri, sha256="a" * 64, width=image.width, height=image.height)
