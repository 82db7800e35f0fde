"""The picture of a comparison: the figure of merit over the MACs that ran, one point per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from dyntune.studies.pictures.style import (
    COLOURS,
    FAINT,
    INK,
    LONGEST_IN_TWO_COLUMNS,
    MARKERS,
    RULE,
    TEXT_SIZE,
    new_figure,
)

if TYPE_CHECKING:
    from dyntune.studies.compare import Row

_LEGEND_LINE = 0.17
"""Inches."""


def tradeoff_figure(rows: Sequence[Row]) -> Figure:
    """Test accuracy, or other figure of merit, (%) over MACs per image (M); dashed, the MACs of the untouched backbone.

    Args:
        rows: a row per method, with counted MACs.
    """
    columns = 1 if max(len(row.method) for row in rows) > LONGEST_IN_TWO_COLUMNS else 2
    lines = math.ceil((len(rows) + 1) / columns)
    figure = new_figure(6.4, 3.2 + _LEGEND_LINE * lines, layout="constrained")
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
    axes.set_xlabel("MACs per image (M)", color=INK, fontsize=TEXT_SIZE)
    axes.set_ylabel(f"test {rows[0].test.merit} (%)", color=INK, fontsize=TEXT_SIZE)
    axes.tick_params(colors=FAINT, labelsize=TEXT_SIZE)
    axes.grid(color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    legend = figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=TEXT_SIZE)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
