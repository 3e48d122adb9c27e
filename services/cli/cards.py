"""The cards of an evidence picture: what each step showed, as pictures with labels. Loads pictures, draws none.

A comparison's composite stands beside the part and the normal part it was made of, because a person reads two pictures
more easily than one in false colours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image

from agentiad.v1 import events_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.agent import protocol
from services.chassis.errors import BadInput, Exhausted, Transient
from services.cli import story
from services.cli.drawing import Box, Frame, frame_rect

Load = Callable[[pb.ImageReference], Image.Image]

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
ANSWER_COLOUR = "#DC2626"
TRUTH_COLOUR = "#111827"
# One a step, then again from the first. None looks like the red, green and amber of decisions.
STEP_COLOURS = ("#2563EB", "#9333EA", "#0891B2", "#DB2777", "#4F46E5", "#0F766E", "#A16207", "#475569")
# A box over more than this share of a picture's sides points at nothing.
_NEARLY_ALL = 0.9
_CLOSE_UP, _MIN_CLOSE_UP_PX = 3, 48  # a close-up is so many times its box, and no smaller than that


@dataclass(frozen=True)
class Tile:
    """A picture with a label, or the reason why there is none."""

    image: Image.Image | None
    label: str
    reason: str = ""
    frames: tuple[Frame, ...] = ()

    @property
    def aspect(self) -> float:
        """Width over height of the room it wants; extreme pictures get a moderate room."""
        if self.image is None:
            return 1.25
        return min(max(self.image.width / self.image.height, 0.7), 2.0)


@dataclass(frozen=True)
class Card:
    """A step: `main` pictures in a row, then `side` pictures of half the height under each other."""

    number: int
    colour: str
    title: str
    took: str
    thought: str
    main: tuple[Tile, ...]
    side: tuple[Tile, ...] = ()
    composite: bool = False  # the first picture is in false colours and needs a legend


def step_colour(number: int) -> str:
    return STEP_COLOURS[(number - 1) % len(STEP_COLOURS)]


def step_cards(inspection: events_pb2.InspectionCompleted, original: Tile, load: Load) -> list[Card]:
    """A card for each step, in their order."""
    maker = _Maker(inspection, original, load)
    return [maker.card(step) for step in story.tell(inspection.trajectory).steps]


def original_tile(inspection: events_pb2.InspectionCompleted, load: Load, truth: pb.GroundTruth | None) -> Tile:
    """The inspected picture with the boxes of the steps, of the truth and of the answer."""
    frames = []
    for step in story.tell(inspection.trajectory).steps:
        seen = step.observation
        if seen is not None and seen.HasField("image") and not _nearly_all(protocol.box_tuple(seen.region)):
            frames.append(Frame(protocol.box_tuple(seen.region), step_colour(step.number), step.number))
    for defect in truth.defects if truth is not None else ():
        if defect.HasField("box"):
            frames.append(Frame(protocol.box_tuple(defect.box), TRUTH_COLOUR, dashed=True))
    if inspection.verdict.HasField("box"):
        frames.append(Frame(protocol.box_tuple(inspection.verdict.box), ANSWER_COLOUR))
    return loaded(inspection.trajectory.task.image.reference, "", load, tuple(frames))


def close_up(original: Tile, aspect: float) -> Tile | None:
    """The place that the answer names, with some of its surroundings, at about the given width over height."""
    boxes = [frame.box for frame in original.frames if frame.colour == ANSWER_COLOUR]
    if original.image is None or not boxes:
        return None
    wide, high = original.image.size
    left, top, right, bottom = frame_rect(boxes[0], original.image.size)
    height = max(_CLOSE_UP * (bottom - top), _CLOSE_UP * (right - left) / aspect, _MIN_CLOSE_UP_PX)
    x, width = _span((left + right) / 2, height * aspect, wide)
    y, height = _span((top + bottom) / 2, height, high)
    region = (x / wide, y / high, (x + width) / wide, (y + height) / high)
    return Tile(_cut(original.image, region), "where it is", frames=_relative(boxes[0], region))


def _span(centre: float, extent: float, limit: int) -> tuple[float, float]:
    """Start and extent of a stretch around `centre`, moved or cut to lie inside 0 to `limit`."""
    extent = min(extent, limit)
    return min(max(centre - extent / 2, 0.0), limit - extent), extent


def _relative(box: Box, region: Box) -> tuple[Frame, ...]:
    """The answer's box on a picture of `region`, where it points at something that can be seen there."""
    wide, high = region[2] - region[0], region[3] - region[1]
    area = (box[2] - box[0]) * (box[3] - box[1])
    if not (wide > 0 and high > 0 and area > 0):
        return ()
    clipped = (
        max(box[0], region[0]),
        max(box[1], region[1]),
        min(box[2], region[2]),
        min(box[3], region[3]),
    )
    seen = max(0.0, clipped[2] - clipped[0]) * max(0.0, clipped[3] - clipped[1])
    inside = (
        (clipped[0] - region[0]) / wide,
        (clipped[1] - region[1]) / high,
        (clipped[2] - region[0]) / wide,
        (clipped[3] - region[1]) / high,
    )
    if seen < area / 2 or _nearly_all(inside):
        return ()
    return (Frame(inside, ANSWER_COLOUR, line=3),)


def loaded(reference: pb.ImageReference, label: str, load: Load, frames: tuple[Frame, ...] = ()) -> Tile:
    """The picture, or a tile that says why it cannot be shown."""
    try:
        return Tile(load(reference), label, frames=frames)
    except (BadInput, Transient, Exhausted, OSError) as error:
        return Tile(None, label, str(error) or type(error).__name__)


class _Maker:
    def __init__(self, inspection: events_pb2.InspectionCompleted, original: Tile, load: Load) -> None:
        self._view = inspection.trajectory.comparison_view
        self._answer = protocol.box_tuple(inspection.verdict.box) if inspection.verdict.HasField("box") else None
        self._original = original.image
        self._load = load

    def card(self, step: story.Step) -> Card:
        seen = step.observation
        composite = False
        side: tuple[Tile, ...] = ()
        if seen is None:
            main: tuple[Tile, ...] = (Tile(None, "", "The episode ended before the answer came."),)
        elif not seen.HasField("image"):
            main = (Tile(None, "", seen.tool_error or "The tool showed nothing."),)
        elif not seen.HasField("exemplar"):
            frames = self._frames(protocol.box_tuple(seen.region))
            main = (loaded(seen.image, "", self._load, frames),)
        elif seen.registered and self._view == pb.COMPARISON_VIEW_COMPOSITE:
            composite = True
            main = (loaded(seen.image, "what the agent saw", self._load),)
            side = (self._part(seen), self._normal(seen, main[0].image))
        else:
            label = "normal part" if seen.registered else "normal part, not aligned"
            main = (self._part(seen), loaded(seen.image, label, self._load))
        took = f"{(step.thinking + step.seeing).total_seconds():.2f} s"
        return Card(step.number, step_colour(step.number), step.title, took, step.thought, main, side, composite)

    def _part(self, seen: pb.Observation) -> Tile:
        """The inspected part in the region of the comparison."""
        if self._original is None:
            return Tile(None, "this part", "The original cannot be shown.")
        region = protocol.box_tuple(seen.region)
        return Tile(_cut(self._original, region), "this part", frames=self._frames(region))

    def _normal(self, seen: pb.Observation, composite: Image.Image | None) -> Tile:
        """The normal part in the region of the comparison: of a closer look, as it is aligned in the composite."""
        if composite is None or _nearly_all(protocol.box_tuple(seen.region)):
            return loaded(seen.exemplar, "normal part", self._load)
        return Tile(composite.convert("RGB").getchannel("G"), "normal part")

    def _frames(self, region: Box) -> tuple[Frame, ...]:
        return _relative(self._answer, region) if self._answer is not None else ()


def _nearly_all(box: Box) -> bool:
    return box[2] - box[0] > _NEARLY_ALL and box[3] - box[1] > _NEARLY_ALL


def _cut(image: Image.Image, region: Box) -> Image.Image:
    return image.crop(frame_rect(region, image.size))
