"""The picture of a measurement: speed-up over the dense model beside what the MACs promise."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from dyntune.studies.bench.peers import DENSE
from dyntune.studies.bench.run import Report
from dyntune.studies.pictures.style import (
    COLOURS,
    FAINT,
    INK,
    LONGEST_IN_TWO_COLUMNS,
    RULE,
    TEXT_SIZE,
    TITLE_SIZE,
    lighter,
    new_figure,
)

_LEGEND_LINE = 0.17
"""Inches."""


def speed_figure(report: Report) -> Figure:
    """Bars of the speed-up over ``dense`` with quartiles, a panel per batch size; a line across each, its MACs ratio.

    Args:
        report: with at least one candidate beside ``dense``.
    """
    names = [name for name in dict.fromkeys(row.name for row in report.rows) if name != DENSE]
    batches = list(dict.fromkeys(row.batch_size for row in report.rows))
    runtimes = list(report.measured)
    columns = 1 if max(map(len, names)) > LONGEST_IN_TWO_COLUMNS else 2
    lines = math.ceil((len(names) + 2) / columns)
    width = max(5.0, len(batches) * (0.8 + 0.28 * len(names) * len(runtimes)))
    figure = new_figure(width, 2.8 + _LEGEND_LINE * lines, layout="constrained")
    panels = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    bar = 0.8 / len(names)
    for axes, batch in zip(panels, batches, strict=True):
        for row in report.rows:
            if row.batch_size != batch or row.name == DENSE:
                continue
            index = names.index(row.name)
            colour = COLOURS[index % len(COLOURS)]
            # Beyond the palette's length bars of one colour are told apart by a paler one.
            fill = lighter(colour) if index >= len(COLOURS) else colour
            x = runtimes.index(row.runtime) + (index - (len(names) - 1) / 2) * bar
            speed = row.speedup
            whiskers = [[speed.median - speed.low], [speed.high - speed.median]]
            axes.bar(x, speed.median, 0.9 * bar, color=fill, yerr=whiskers, error_kw={"ecolor": FAINT, "lw": 1})
            axes.hlines(row.macs_ratio, x - 0.5 * bar, x + 0.5 * bar, color=INK, linewidth=1.4)
        axes.axhline(1, color=FAINT, linestyle="--", linewidth=1)
        axes.set_xticks(range(len(runtimes)), runtimes)
        axes.set_title(f"batch {batch}", color=INK, fontsize=TITLE_SIZE)
        axes.tick_params(colors=FAINT, labelsize=TEXT_SIZE)
        axes.grid(axis="y", color=RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[0].set_ylabel("speed-up over dense", color=INK, fontsize=TEXT_SIZE)
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        panels[0].bar(0, 0, color=lighter(colour) if index >= len(COLOURS) else colour, label=name)
    panels[0].plot([], [], color=INK, linewidth=1.4, label="MACs of dense over its own")
    panels[0].plot([], [], color=FAINT, linestyle="--", linewidth=1, label="dense in the same runtime")
    legend = figure.legend(loc="outside lower left", ncols=columns, frameon=False, fontsize=TEXT_SIZE)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
