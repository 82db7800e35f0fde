"""The picture of a benchmark: mean accuracy over the MACs that ran, with published results behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dyntune.core.errors import DyntuneError
from dyntune.studies.pictures.style import COLOURS, FAINT, INK, MARKERS, RULE, SMALL_SIZE, TEXT_SIZE, new_figure

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
    axes.set_xlabel("MACs per image (G)", color=INK, fontsize=TEXT_SIZE)
    axes.set_ylabel("mean of group means (%)", color=INK, fontsize=TEXT_SIZE)
    axes.tick_params(colors=FAINT, labelsize=TEXT_SIZE)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    legend = figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=TEXT_SIZE)
    for text in legend.get_texts():
        text.set_parse_math(False)
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
