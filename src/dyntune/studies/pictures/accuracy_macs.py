"""Pictures of accuracy over the MACs that ran: of a comparison, and of a benchmark with published results behind it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyntune.core.errors import DyntuneError
from dyntune.studies.pictures.style import (
    COLOURS,
    FAINT,
    LEGEND_LINE,
    LONGEST_IN_TWO_COLUMNS,
    MARKERS,
    SMALL_SIZE,
    frame,
    legend,
    new_figure,
)

if TYPE_CHECKING:
    from dyntune.studies.compare import Row

_LABEL_WIDTH, _LABEL_HEIGHT = 0.12, 0.028
"""Room that a name takes, as shares of the axes."""


@dataclass(frozen=True)
class Point:
    """A method in the figure.

    Args:
        name: for the legend.
        macs: MACs per image.
        accuracy: mean accuracy between 0 and 1.
        spread: standard deviation of the accuracy; None without several seeds.
    """

    name: str
    macs: float
    accuracy: float
    spread: float | None = None


def accuracy_macs_figure(points: Sequence[Point], published: Sequence[Point] = ()) -> Figure:
    """Mean accuracy (%) over MACs per image (G), one marker per method, its error bar one standard deviation.

    Args:
        points: what was measured.
        published: results to draw behind it, faint and named beside the marker.

    Raises:
        DyntuneError: there is no point.
    """
    if not points and not published:
        raise DyntuneError("no method has finished all its tasks, so there is nothing to draw.")
    figure = new_figure(7.2, 5.0, layout="constrained")
    axes = figure.add_subplot()
    for index, point in enumerate(published):
        axes.scatter(
            point.macs / 1e9,
            100 * point.accuracy,
            s=22,
            facecolor="white",
            edgecolor=FAINT,
            linewidth=0.8,
            zorder=2,
            label="published" if index == 0 else None,
        )
    for index, point in enumerate(points):
        axes.errorbar(
            point.macs / 1e9,
            100 * point.accuracy,
            yerr=None if point.spread is None else 100 * point.spread,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
            markersize=7,
            linestyle="none",
            capsize=3,
            zorder=3,
            label=point.name,
        )
    axes.margins(x=0.14, y=0.1)
    _name(axes, published)
    frame(axes, "MACs per image (G)", "mean of group means (%)")
    legend(figure, "outside lower center", 2)
    return figure


def _name(axes: Axes, points: Sequence[Point]) -> None:
    """Writes each name to the right or left of its marker, lower down where names would lie on each other."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    near, gap = _LABEL_WIDTH * (right - left), _LABEL_HEIGHT * (top - bottom)
    placed: list[tuple[str, float, float]] = []
    for point in sorted(points, key=lambda one: -one.accuracy):
        x, y = point.macs / 1e9, 100 * point.accuracy

        def free(side: str, height: float, x: float = x) -> bool:
            return not any(s == side and abs(px - x) < near and abs(py - height) < gap for s, px, py in placed)

        side = "right" if free("right", y) or not free("left", y) else "left"
        height = y
        while not free(side, height):
            height -= gap / 4
        placed.append((side, x, height))
        sign = 1 if side == "right" else -1
        words = axes.annotate(point.name, (x, height), xytext=(5 * sign, 0), textcoords="offset points", va="center")
        words.set(horizontalalignment="left" if sign > 0 else "right", fontsize=SMALL_SIZE, color=FAINT)
        words.set_parse_math(False)


def tradeoff_figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy, or other figure of merit, (%) over MACs per image (M); dashed, the MACs of the untouched backbone.

    Args:
        rows: a row per method, with counted MACs.
    """
    columns = 1 if max(len(row.method) for row in rows) > LONGEST_IN_TWO_COLUMNS else 2
    lines = math.ceil((len(rows) + 1) / columns)
    figure = new_figure(6.4, 3.2 + LEGEND_LINE * lines, layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(rows):
        axes.scatter(
            (row.test.macs or 0) / 1e6,
            100 * row.test.score,
            s=60,
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index // len(COLOURS) % len(MARKERS)],
            zorder=3,
            label=row.method,
        )
    dense = rows[0].dense_macs / 1e6
    axes.axvline(dense, color=FAINT, linestyle="--", linewidth=1, label="MACs of the untouched backbone")
    axes.set_xlim(0, max([dense, *((row.test.macs or 0) / 1e6 for row in rows)]) * 1.08)
    frame(axes, "MACs per image (M)", f"test {rows[0].test.merit} (%)")
    legend(figure, "outside lower left", columns)
    return figure
