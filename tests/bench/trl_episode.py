"""The inspection episode for TRL's GRPOTrainer: services.agent's own state machine behind an environment with one tool.

Where TRL does less than the agent: exemplars come from the manifest, pictures from memory; nothing crosses a wire or is
stored; no verdict is forced on a policy that has not answered in its last turn; no P(anomaly) is read.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.agent import episode, protocol
from services.data import readers
from services.zoom import compare, crop
from services.zoom.registration import Registration, register

# The agent's own limits, with shorter turns: no reply of pocket comes near them.
LIMITS = pb.Limits(max_turns=6, max_tool_calls=3, max_new_tokens=128)
Block = dict[str, Any]  # of a message's content, as TRL takes it


class Parts:
    """The parts and their exemplars, decoded, each pair registered once."""

    def __init__(self, folder: Path) -> None:
        self.samples = [sample for sample in readers.read(folder) if sample.split == "val"]
        self.pictures = [sample.open() for sample in self.samples]
        self.exemplars = [sample.open_reference() for sample in self.samples]
        self._registrations: dict[int, Registration] = {}

    def registration(self, part: int) -> Registration:
        exemplar = self.exemplars[part]
        assert exemplar is not None, "every procedural part names its exemplar"
        if part not in self._registrations:
            self._registrations[part] = register(self.pictures[part], exemplar)
        return self._registrations[part]

    def truth(self, part: int) -> pb.GroundTruth:
        sample = self.samples[part]
        truth = pb.GroundTruth(anomaly_present=sample.anomalous)
        for defect in sample.defects:
            x_min, y_min, x_max, y_max = defect.box
            truth.defects.add(type=defect.type, box=pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max))
        return truth


class Episode:
    """One episode on one part. Its tools run in this process."""

    def __init__(self, parts: Parts, part: int, card: PolicyCard) -> None:
        self._parts, self.part = parts, part
        sample = parts.samples[part]
        image = pb.Image(reference=pb.ImageReference(uri=str(sample.image)))
        task = pb.Task(image=image, category=sample.category)
        sampling = pb.Sampling(temperature=1, max_new_tokens=LIMITS.max_new_tokens)
        self.trajectory = episode.begin(f"part-{part}", task, LIMITS, sampling, card)

    def opening(self) -> list[Block]:
        """The user's first turn."""
        return _blocks(self.trajectory.turns[-1].message, self._parts.pictures[self.part])

    def after(self, reply: str) -> list[Block]:
        """The user's turn that answers a reply which is no answer."""
        episode.add_generation(self.trajectory, pb.Generation(text=reply), timedelta())
        step = episode.next_step(self.trajectory)
        shown = None
        if isinstance(step, episode.CropStep | episode.QueryStep):
            observation, shown = self._observe(step)
            episode.add_observation(self.trajectory, observation, timedelta())
        return _blocks(self.trajectory.turns[-1].message, shown)

    def conclude(self, reply: str) -> None:
        """Takes the last reply. Where it is no answer, the episode ends without a verdict: TRL cannot force one."""
        episode.add_generation(self.trajectory, pb.Generation(text=reply), timedelta())
        if not self.trajectory.stop_reason:
            called = isinstance(protocol.parse(reply), protocol.CropCall | protocol.QueryCall)
            self.trajectory.stop_reason = pb.STOP_REASON_LIMIT if called else pb.STOP_REASON_MALFORMED

    def _observe(self, step: episode.CropStep | episode.QueryStep) -> tuple[pb.Observation, Image.Image | None]:
        box = None if step.box is None else protocol.box_tuple(step.box)
        try:
            if isinstance(step, episode.CropStep) and step.exemplar is None:
                assert box is not None
                picture = self._parts.pictures[self.part]
                cut = crop.cut_of(picture.size, box)
                return _observation(cut.region), crop.fit(picture.crop(cut.pixels))
            return self._compared(box)
        except crop.ToolError as error:
            return pb.Observation(tool_error=str(error)), None

    def _compared(self, box: tuple[float, ...] | None) -> tuple[pb.Observation, Image.Image]:
        exemplar, registration = self._parts.exemplars[self.part], self._parts.registration(self.part)
        assert exemplar is not None
        drawn = compare.compare(self._parts.pictures[self.part], exemplar, box, compare.View.COMPOSITE, registration)
        observation = _observation(drawn.region)
        observation.exemplar.uri = str(self._parts.samples[self.part].reference)
        observation.registered, observation.registration_confidence = registration.registered, registration.confidence
        return observation, drawn.image


class Inspection:
    """TRL's environment: its public methods are the policy's tools."""

    def __init__(self, parts: Parts, card: PolicyCard) -> None:
        self._parts, self._card = parts, card

    def reset(self, part: int, **_: object) -> list[Block]:
        self.episode = Episode(self._parts, part, self._card)
        return self.episode.opening()

    def act(self, reply: str) -> list[Block]:
        """Answers a reply.

        Args:
            reply: The whole reply.

        Returns:
            The next user turn.
        """
        return self.episode.after(reply)


def _observation(region: crop.Region) -> pb.Observation:
    x_min, y_min, x_max, y_max = region
    return pb.Observation(
        image=pb.ImageReference(uri="memory:"), region=pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max)
    )


def _blocks(message: pb.Message, picture: Image.Image | None) -> list[Block]:
    return [
        {"type": "image", "image": picture} if segment.HasField("image") else {"type": "text", "text": segment.text}
        for segment in message.segments
    ]
