"""Procedural parts that are made of elements at places which only the variant knows. Pure.

Places, kinds and the number of elements are random by variant, so that a single part never tells whether an element is
missing, moved, extra or wrong: only a normal unit of the same variant does.
"""

from dataclasses import dataclass, replace

import cv2
import numpy as np
import numpy.typing as npt

from services.data.textures import SIZE

Colour = npt.NDArray[np.uint8]  # [SIZE, SIZE, 3] RGB
Bounds = tuple[float, float, float, float]  # x_min, y_min, x_max, y_max in pixels

LAYOUTS = ("pin_board", "circuit", "stamped_plate")
LAYOUT_DEFECTS = {
    "pin_board": ("missing", "displaced", "extra", "wrong_element"),
    "circuit": ("missing", "displaced", "extra", "wrong_element"),
    "stamped_plate": ("wrong_stamp", "incomplete_stamp"),
}

_KINDS = {"pin_board": ("pin", "pad", "bush", "post"), "circuit": ("chip", "resistor", "capacitor", "diode")}
_BASES = {"pin_board": (120, 120, 130), "circuit": (60, 110, 80), "stamped_plate": (150, 148, 142)}
_MARGIN = 34  # keeps elements whole when a unit is shifted and turned
_STROKE_GRID = 4  # a stamp's strokes join points of a grid of this many by this many


@dataclass(frozen=True)
class Element:
    kind: str
    x: float
    y: float
    size: float  # half of the longer side, pixels
    upright: bool
    strokes: tuple[tuple[int, int, int, int], ...] = ()  # stamps only: grid points x1, y1, x2, y2

    @property
    def bounds(self) -> Bounds:
        half_x, half_y = self.size, self.size
        if self.kind in ("resistor", "diode", "pad"):
            half_x, half_y = (self.size * 0.55, self.size) if self.upright else (self.size, self.size * 0.55)
        return (self.x - half_x, self.y - half_y, self.x + half_x, self.y + half_y)


@dataclass(frozen=True)
class Layout:
    """What all units of a variant share."""

    category: str
    background: tuple[float, float, float]
    decorations: tuple[tuple[str, int, int, int, int, int], ...]  # kind, x1, y1, x2, y2, shade
    elements: tuple[Element, ...]


def make_layout(category: str, rng: np.random.Generator) -> Layout:
    """Draws a variant: colour, decorations and 9 to 15 elements (one stamp on a stamped plate)."""
    red, green, blue = np.clip(np.array(_BASES[category]) + rng.uniform(-34, 34, 3), 30, 200).tolist()
    elements: list[Element] = []
    for _ in range(1 if category == "stamped_plate" else int(rng.integers(9, 16))):
        element = _free_element(category, rng, elements)
        if element is not None:
            elements.append(element)
    return Layout(category, (red, green, blue), _decorations(category, rng), tuple(elements))


def spoil(layout: Layout, defect: str, rng: np.random.Generator) -> tuple[Layout, Bounds]:
    """The layout with one defect, and the pixels where it differs from the normal one."""
    elements = list(layout.elements)
    if defect == "extra":
        added = _free_element(layout.category, rng, elements)
        if added is None:  # a full board: there is always an element to take away
            return spoil(layout, "missing", rng)
        return replace(layout, elements=(*elements, added)), added.bounds
    index = int(rng.integers(len(elements)))
    old = elements.pop(index)
    if defect == "missing":
        return replace(layout, elements=tuple(elements)), old.bounds
    new = _changed(layout.category, old, defect, rng)
    return replace(layout, elements=(*elements[:index], new, *elements[index:])), _union(old.bounds, new.bounds)


def draw(layout: Layout) -> Colour:
    """The ideal unit, neither moved nor lit, with no grain."""
    image = np.empty((SIZE, SIZE, 3), np.uint8)
    image[:] = np.array(layout.background, np.uint8)
    for kind, x1, y1, x2, y2, shade in layout.decorations:
        colour = tuple(int(np.clip(value + shade, 0, 255)) for value in layout.background)
        if kind == "field":
            cv2.rectangle(image, (x1, y1), (x2, y2), colour, -1)
        elif kind == "hole":
            cv2.circle(image, (x1, y1), x2, colour, -1, cv2.LINE_AA)
        else:
            cv2.line(image, (x1, y1), (x2, y2), colour, 3, cv2.LINE_AA)
    for element in layout.elements:
        _DRAWERS[element.kind](image, element)
    return image


def _free_element(category: str, rng: np.random.Generator, others: list[Element]) -> Element | None:
    for _ in range(40):
        x, y = rng.uniform(_MARGIN, SIZE - _MARGIN, 2)
        if category == "stamped_plate":
            return Element("stamp", x, y, rng.uniform(20, 28), True, _strokes(rng))
        kind = str(rng.choice(_KINDS[category]))
        size = rng.uniform(9, 13) if category == "pin_board" else rng.uniform(11, 17)
        if all(np.hypot(x - other.x, y - other.y) > size + other.size + 12 for other in others):
            return Element(kind, x, y, size, bool(rng.integers(2)))
    return None


def _changed(category: str, old: Element, defect: str, rng: np.random.Generator) -> Element:
    if defect == "displaced":
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(10, 15)
        x, y = old.x + distance * np.cos(angle), old.y + distance * np.sin(angle)
        return replace(old, x=float(np.clip(x, 26, SIZE - 26)), y=float(np.clip(y, 26, SIZE - 26)))
    if defect == "wrong_element":
        return replace(old, kind=str(rng.choice([kind for kind in _KINDS[category] if kind != old.kind])))
    if defect == "wrong_stamp":
        return replace(old, strokes=_strokes(rng))
    if defect == "incomplete_stamp":
        return replace(old, strokes=old.strokes[: len(old.strokes) // 2])
    raise ValueError(f"unknown defect {defect!r}")


def _strokes(rng: np.random.Generator) -> tuple[tuple[int, int, int, int], ...]:
    # Two to eight strokes: half of a long stamp looks like a whole short one.
    strokes: list[tuple[int, int, int, int]] = []
    while len(strokes) < int(2 + rng.integers(7)):
        x1, y1, x2, y2 = (int(value) for value in rng.integers(0, _STROKE_GRID, 4))
        if abs(x1 - x2) + abs(y1 - y2) >= 2:
            strokes.append((x1, y1, x2, y2))
    return tuple(strokes)


def _decorations(category: str, rng: np.random.Generator) -> tuple[tuple[str, int, int, int, int, int], ...]:
    # Large and contrasted: they make variants easy to tell apart and give the registration something to hold on to.
    items: list[tuple[str, int, int, int, int, int]] = []
    for _ in range(int(rng.integers(2, 4))):
        x, y = (int(value) for value in rng.integers(0, SIZE - 110, 2))
        width, height = (int(value) for value in rng.integers(70, 190, 2))
        items.append(("field", x, y, min(x + width, SIZE), min(y + height, SIZE), _shade(rng, 20, 36)))
    for _ in range(int(rng.integers(6, 10))):
        x1, y1, x2, y2 = (int(value) for value in rng.integers(10, SIZE - 10, 4))
        corner = (x2, y1) if rng.integers(2) else (x1, y2)
        items.append(("trace", x1, y1, *corner, _shade(rng, 28, 50)))
    if category == "stamped_plate":
        for _ in range(int(rng.integers(6, 10))):
            x, y = (int(value) for value in rng.integers(20, SIZE - 20, 2))
            items.append(("hole", x, y, int(rng.integers(7, 14)), 0, -int(rng.integers(50, 90))))
    return tuple(items)


def _shade(rng: np.random.Generator, low: int, high: int) -> int:
    return int(rng.integers(low, high)) * (1 if rng.integers(2) else -1)


def _union(a: Bounds, b: Bounds) -> Bounds:
    return (min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


def _rectangle(image: Colour, bounds: Bounds, colour: tuple[int, int, int]) -> None:
    x1, y1, x2, y2 = (round(value) for value in bounds)
    cv2.rectangle(image, (x1, y1), (x2, y2), colour, -1)


def _scaled(bounds: Bounds, x: float, y: float) -> Bounds:
    cx, cy = (bounds[0] + bounds[2]) / 2, (bounds[1] + bounds[3]) / 2
    dx, dy = (bounds[2] - bounds[0]) / 2 * x, (bounds[3] - bounds[1]) / 2 * y
    return (cx - dx, cy - dy, cx + dx, cy + dy)


def _disc(image: Colour, element: Element, outer: tuple[int, int, int], inner: tuple[int, int, int]) -> None:
    centre = (round(element.x), round(element.y))
    cv2.circle(image, centre, round(element.size), outer, -1, cv2.LINE_AA)
    cv2.circle(image, centre, round(element.size * 0.55), inner, -1, cv2.LINE_AA)


def _pad(image: Colour, element: Element) -> None:
    _rectangle(image, element.bounds, (212, 196, 140))
    _rectangle(image, _scaled(element.bounds, 0.5, 0.5), (236, 226, 190))


def _post(image: Colour, element: Element) -> None:
    _rectangle(image, element.bounds, (40, 42, 48))
    _rectangle(image, _scaled(element.bounds, 0.5, 0.5), (180, 60, 50))


def _chip(image: Colour, element: Element) -> None:
    bounds = element.bounds
    for share in (-0.6, 0.0, 0.6):
        y = element.y + share * element.size
        _rectangle(image, (bounds[0], y - 1.5, bounds[2], y + 1.5), (205, 205, 205))
    _rectangle(image, _scaled(bounds, 0.7, 1), (28, 28, 32))


def _resistor(image: Colour, element: Element) -> None:
    bounds = element.bounds
    _rectangle(image, bounds, (214, 184, 134))
    across = (0.15, 1.0) if not element.upright else (1.0, 0.15)
    _rectangle(image, _scaled(bounds, *across), (120, 50, 40))


def _diode(image: Colour, element: Element) -> None:
    bounds = element.bounds
    _rectangle(image, bounds, (190, 70, 40))
    half = (
        (bounds[0], bounds[1], bounds[2], element.y)
        if element.upright
        else (bounds[0], bounds[1], element.x, bounds[3])
    )
    _rectangle(image, half, (235, 225, 215))


def _stamp(image: Colour, element: Element) -> None:
    step = 2 * element.size / (_STROKE_GRID - 1)
    left, top = element.x - element.size, element.y - element.size
    for x1, y1, x2, y2 in element.strokes:
        start = (round(left + x1 * step), round(top + y1 * step))
        end = (round(left + x2 * step), round(top + y2 * step))
        cv2.line(image, start, end, (45, 45, 60), 4, cv2.LINE_AA)


_DRAWERS = {
    "pin": lambda image, element: _disc(image, element, (60, 60, 66), (222, 222, 226)),
    "bush": lambda image, element: _disc(image, element, (220, 215, 205), (70, 70, 74)),
    "pad": _pad,
    "post": _post,
    "chip": _chip,
    "resistor": _resistor,
    "capacitor": lambda image, element: _disc(image, element, (40, 60, 120), (190, 196, 210)),
    "diode": _diode,
    "stamp": _stamp,
}
