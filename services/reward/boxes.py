"""Boxes in the coordinates of an image, [0, 1] along both sides. Pure.

Invariant: a Region lies in the image and has an area above 0; a box of which nothing does, or with a number that is not
finite, is None from the start. So no ratio of areas here divides by 0, and each lies in [0, 1].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from agentiad.v1 import trajectory_pb2 as pb

# x_min, y_min, x_max, y_max
Region = tuple[float, float, float, float]
WHOLE: Region = (0.0, 0.0, 1.0, 1.0)


def region(x_min: float, y_min: float, x_max: float, y_max: float) -> Region | None:
    """What of the box lies in the image."""
    if not all(math.isfinite(value) for value in (x_min, y_min, x_max, y_max)):
        return None
    clipped = (max(0.0, x_min), max(0.0, y_min), min(1.0, x_max), min(1.0, y_max))
    # The sides first: two negative ones have an area above 0 as well.
    return clipped if _side(clipped, 0) > 0 and _side(clipped, 1) > 0 and area(clipped) > 0 else None


def region_of(box: pb.Box) -> Region | None:
    """The same of a message; an absent box is empty, so None."""
    return region(box.x_min, box.y_min, box.x_max, box.y_max)


def within(box: Region, frame: Region) -> Region | None:
    """A box in the coordinates of a picture of `frame`, in the coordinates that `frame` is given in."""
    width, height = _side(frame, 0), _side(frame, 1)
    return region(
        frame[0] + box[0] * width, frame[1] + box[1] * height, frame[0] + box[2] * width, frame[1] + box[3] * height
    )


def grown(box: Region, margin: float) -> Region:
    """The box with `margin` more on every side, as far as the image goes."""
    larger = region(box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin)
    assert larger is not None, "a box that grows keeps its area"
    return larger


def area(box: Region) -> float:
    return _side(box, 0) * _side(box, 1)


def covered(box: Region, by: Region) -> float:
    """The share of the box that `by` covers."""
    shared = _shared(box, by)
    return area(shared) / area(box) if shared else 0.0


def iou(shape: Sequence[Region], box: Region) -> float:
    """Intersection over union of the union of `shape`'s boxes and the box; 0 for no boxes."""
    shared = _area_of_union([part for part in (_shared(piece, box) for piece in shape) if part])
    whole = _area_of_union(shape)
    # Both bounds hold but for rounding.
    return shared / max(whole + area(box) - shared, whole, area(box))


def _side(box: Region, axis: int) -> float:
    return box[axis + 2] - box[axis]


def _shared(one: Region, other: Region) -> Region | None:
    low_x, low_y = max(one[0], other[0]), max(one[1], other[1])
    return region(low_x, low_y, min(one[2], other[2]), min(one[3], other[3]))


def _area_of_union(boxes: Sequence[Region]) -> float:
    """Strip by strip between the boxes' left and right edges: in each the boxes are intervals of y."""
    edges = sorted({box[0] for box in boxes} | {box[2] for box in boxes})
    return sum(
        (right - left) * _length_of_union([box for box in boxes if box[0] <= left and box[2] >= right])
        for left, right in itertools.pairwise(edges)
    )


def _length_of_union(boxes: Sequence[Region]) -> float:
    length, end = 0.0, 0.0
    for low, high in sorted((box[1], box[3]) for box in boxes):
        length += max(0.0, high - max(low, end))
        end = max(end, high)
    return length
