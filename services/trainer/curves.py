"""A run's metrics as one picture: a small panel a metric, those whose names begin with the same word side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # Imported late: only a run that ends needs it.
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches, from here to _PANEL; a cell is a panel with its title and tick labels.
_COLUMNS = 4
_CELL, _MARGIN, _TOP = (3.7, 2.3), 0.3, 0.65
_LEFT, _RIGHT, _BOTTOM, _HEAD = 0.62, 0.2, 0.32, 0.68
_PANEL = (_CELL[0] - _LEFT - _RIGHT, _CELL[1] - _BOTTOM - _HEAD)
_DPI = 110
_INK, _SOFT, _LINE, _PAPER = "#111827", "#6B7280", "#DFE2E7", "#F8F9FB"
# One a group, then again from the first.
_COLOURS = ("#2563EB", "#15803D", "#B45309", "#9333EA", "#0891B2", "#DB2777", "#4F46E5", "#0F766E", "#DC2626")
# A run over the width of the average, which thus looks alike in short and in long runs.
_SMOOTHNESS = 40

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Block:
    """Metrics of one group in a row of panels. `column`: of its first panel."""

    group: str
    colour: str
    names: tuple[str, ...]
    row: int
    column: int


def draw(metrics: Path, target: Path) -> None:
    """`metrics`: JSON Lines with a `step` each, as a journal writes them. `target`: the PNG. OSError."""
    from matplotlib.figure import Figure

    series = read_series(metrics)
    blocks = arranged(list(series))
    rows = max((block.row + 1 for block in blocks), default=1)
    size = (2 * _MARGIN + _COLUMNS * _CELL[0], _TOP + rows * _CELL[1] + _MARGIN)
    figure = Figure(figsize=size, dpi=_DPI, facecolor="white")
    steps = sorted({step for points in series.values() for step, _ in points})
    words = f"{len(steps)} step{'s' if len(steps) != 1 else ''}"
    _write(figure, _MARGIN, 0.42, f"{metrics.resolve().parent.name}  ·  {words}", 15, _INK, bold=True)
    for block in blocks:
        _draw_block(figure, block, series, (steps[0], steps[-1]) if steps else (0, 1))
    figure.savefig(target, format="png")


def read_series(path: Path) -> dict[str, Points]:
    """Metric → its points by step, only those that are numbers; metrics in the order in which they first appear.

    A last line that is being written is left out. OSError, ValueError for a file of another kind.
    """
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            row = json.loads(line)
            rows[row.pop("step")] = row
    series: dict[str, Points] = {}
    for step, row in sorted(rows.items()):
        for name, value in row.items():
            points = series.setdefault(name, [])
            if isinstance(value, int | float) and math.isfinite(value):
                points.append((step, value))
    return series


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean around each value, weighted by exp(-|distance| / width): of both sides, so that it does not lag."""
    decay = math.exp(-_SMOOTHNESS / max(len(values), _SMOOTHNESS))
    sums = _both_sides(values, decay)
    weights = _both_sides([1.0] * len(values), decay)
    return [total / weight for total, weight in zip(sums, weights, strict=True)]


def _both_sides(values: Sequence[float], decay: float) -> list[float]:
    """For each value the sum of all, each multiplied by decay ** distance."""
    before = list(accumulate(values, lambda total, value: decay * total + value))
    after = list(accumulate(reversed(values), lambda total, value: decay * total + value))[::-1]
    # The value itself is in both.
    return [b + a - value for b, a, value in zip(before, after, values, strict=True)]


def arranged(names: Sequence[str]) -> list[Block]:
    """Each group in a row of its own, or in what an earlier row has left; a large one over several, downwards."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split("/")[0], []).append(name)
    blocks: list[Block] = []
    used: list[int] = []
    for i, (group, members) in enumerate(groups.items()):
        row = -1
        for first in range(0, len(members), _COLUMNS):
            part = tuple(members[first : first + _COLUMNS])
            free = (r for r in range(row + 1, len(used)) if used[r] + len(part) <= _COLUMNS)
            row = next(free, len(used))
            if row == len(used):
                used.append(0)
            blocks.append(Block(group, _COLOURS[i % len(_COLOURS)], part, row, used[row]))
            used[row] += len(part)
    return blocks


def _draw_block(figure: Figure, block: Block, series: dict[str, Points], span: tuple[int, int]) -> None:
    from matplotlib.lines import Line2D

    wide, high = figure.get_size_inches()
    top = _TOP + block.row * _CELL[1]
    left = _MARGIN + block.column * _CELL[0]
    right = left + len(block.names) * _CELL[0] - _RIGHT
    _write(figure, left, top + 0.2, block.group, 12, block.colour, bold=True)
    level = 1 - (top + 0.27) / high
    figure.add_artist(Line2D([left / wide, right / wide], [level, level], color=block.colour, linewidth=1.2))
    for i, name in enumerate(block.names):
        x, y = left + i * _CELL[0] + _LEFT, high - top - _HEAD - _PANEL[1]
        axes = figure.add_axes((x / wide, y / high, _PANEL[0] / wide, _PANEL[1] / high))
        _draw_panel(axes, name, series[name], span, block.colour)


def _draw_panel(axes: Axes, name: str, points: Points, span: tuple[int, int], colour: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_facecolor(_PAPER)
    axes.grid(color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_SOFT, labelsize=8, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    words = " ".join(name.split("/")[1:]).replace("_", " ")
    axes.set_title(words, loc="left", fontsize=10, color=_INK, pad=5, parse_math=False)
    margin = max(0.5, 0.02 * (span[1] - span[0]))
    axes.set_xlim(span[0] - margin, span[1] + margin)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value, 6)))
    if not points:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no numbers", transform=axes.transAxes, ha="center", va="center", color=_SOFT, fontsize=9)
        return
    steps, values = zip(*points, strict=True)
    line = smoothed(values)
    axes.plot(steps, values, ".", color=colour, alpha=0.4, markersize=5, markeredgewidth=0)
    axes.plot(steps, line, color=colour, linewidth=1.8, solid_capstyle="round")
    axes.plot(steps[-1:], line[-1:], "o", color=colour, markersize=4)
    if min(values) == max(values):
        # By itself matplotlib would zoom in on nothing.
        room = abs(values[0]) or 1.0
        axes.set_ylim(values[0] - room, values[0] + room)
    axes.set_title(_short(line[-1]), loc="right", fontsize=10, color=colour, fontweight="bold", pad=5)


def _short(value: float, digits: int = 3) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.{digits}g}"


def _write(figure: Figure, x: float, y: float, text: str, size: int, colour: str, *, bold: bool = False) -> None:
    """`x`, `y`: inches from the upper left corner to the start of the baseline."""
    wide, high = figure.get_size_inches()
    weight = "bold" if bold else "normal"
    figure.text(x / wide, 1 - y / high, text, fontsize=size, color=colour, fontweight=weight, parse_math=False)
