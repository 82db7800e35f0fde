"""A measurement as people read it: a table like the paper's Table 4, one with every figure, and a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dyntune.core.errors import SpecError
from dyntune.core.files import write_json, write_text
from dyntune.core.texts import for_markdown, listed, printable
from dyntune.studies import pictures
from dyntune.studies.bench.measure import Row
from dyntune.studies.bench.peers import DENSE
from dyntune.studies.bench.run import PLAN, Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEASUREMENTS = "measurements"
"""Folder beside what is written, which each measurement is kept in."""
WRITTEN = ("results.json", "results.md", "speed.png")
DETAILS = (
    "runtime",
    "batch",
    "method",
    "active",
    "GMACs",
    "images/s",
    "speed-up",
    "skip efficiency",
    "p50 ms",
    "p90 ms",
    "p99 ms",
    "calls",
    "memory MB",
    "logit difference",
)


def summary(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: MACs of each method, and images per second (speed-up) by runtime, device and batch size.

    Active patches and MACs are those of the largest batch, which tells most of images; each batch has its own among the
    details.
    """
    cells = {(row.runtime, row.batch_size, row.name): row for row in report.rows}
    largest = {row.name: row for row in sorted(report.rows, key=lambda row: row.batch_size)}
    names = dict.fromkeys(row.name for row in report.rows)
    places = list(dict.fromkeys((row.runtime, row.batch_size, row.device) for row in report.rows))
    columns = (
        "method",
        "active",
        "GMACs",
        "of dense",
        *(f"{runtime}, {device}, batch {batch}" for runtime, batch, device in places),
    )
    rows = []
    for name in names:
        row = largest[name]
        speeds = [cells.get((runtime, batch, name)) for runtime, batch, _ in places]
        rows.append(
            (
                name,
                *_work(row),
                f"{1 / row.macs_ratio:.1%}",
                *(f"{s.images_per_second.median:,.1f} ({s.speedup.median:.2f} x)" if s else "-" for s in speeds),
            )
        )
    return columns, rows


def _work(row: Row) -> tuple[str, str]:
    """Active patches and GMACs of an image."""
    return "-" if row.active is None else f"{row.active:.1%}", f"{row.macs / 1e9:.3f}"


def details(report: Report) -> list[tuple[str, ...]]:
    """Every figure as text, under ``DETAILS``."""
    return [
        (
            row.runtime,
            str(row.batch_size),
            row.name,
            *_work(row),
            f"{row.images_per_second.median:,.1f}",
            f"{row.speedup.median:.2f} x [{row.speedup.low:.2f}-{row.speedup.high:.2f}]",
            f"{row.skip_efficiency:.2f}",
            *(f"{1000 * seconds:,.2f}" for seconds in (row.latency.p50, row.latency.p90, row.latency.p99)),
            str(row.latency.calls),
            "-" if row.peak_memory is None else f"{row.peak_memory / 1e6:,.1f}",
            f"{row.difference:.1e}",
        )
        for row in report.rows
    ]


def require_room(folder: Path) -> None:
    """Makes sure that ``write`` overwrites no files but those of a measurement in the same folder.

    Raises:
        SpecError: there are such files of something else.
    """
    taken = [name for name in WRITTEN if (folder / name).exists()]
    if taken and not (folder / MEASUREMENTS / PLAN).exists():
        raise SpecError(f"{folder} holds {listed(taken)} of something else than bench. Give another folder.")


def write(report: Report, folder: Path) -> None:
    """Writes ``results.json``, ``results.md`` with both tables, and ``speed.png`` to a folder."""
    columns, rows = summary(report)
    notes = "\n".join(f"- {note}" for note in report.notes)
    tables = f"{_markdown(columns, rows)}\n\n{_markdown(DETAILS, details(report))}"
    write_json(folder / "results.json", report.to_dict())
    write_text(
        folder / "results.md", f"# {for_markdown(report.title)}\n\n{tables}\n\n{notes}\n\n![Speed-up](speed.png)\n"
    )
    pictures.save_figure(speed_figure(report), folder / "speed.png")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    """A cell that stays one, whatever the name of a run."""
    return printable(text).replace("|", "\\|").replace("<", "&lt;")


def speed_figure(report: Report) -> Figure:
    """Bars of the speed-up over ``dense`` with quartiles, a panel per batch size; a line across each, its MACs ratio.

    Args:
        report: with at least one candidate beside ``dense``.
    """
    # Here, because it brings matplotlib along.
    from dyntune.studies.pictures.style import (
        COLOURS,
        FAINT,
        INK,
        LEGEND_LINE,
        LONGEST_IN_TWO_COLUMNS,
        TITLE_SIZE,
        frame,
        legend,
        lighter,
        new_figure,
    )

    names = [name for name in dict.fromkeys(row.name for row in report.rows) if name != DENSE]
    batches = list(dict.fromkeys(row.batch_size for row in report.rows))
    runtimes = list(report.measured)
    columns = 1 if max(map(len, names)) > LONGEST_IN_TWO_COLUMNS else 2
    lines = math.ceil((len(names) + 2) / columns)
    width = max(5.0, len(batches) * (0.8 + 0.28 * len(names) * len(runtimes)))
    figure = new_figure(width, 2.8 + LEGEND_LINE * lines, layout="constrained")
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
        frame(axes, y="speed-up over dense" if axes is panels[0] else "", grid="y")
    for index, name in enumerate(names):
        colour = COLOURS[index % len(COLOURS)]
        panels[0].bar(0, 0, color=lighter(colour) if index >= len(COLOURS) else colour, label=name)
    panels[0].plot([], [], color=INK, linewidth=1.4, label="MACs of dense over its own")
    panels[0].plot([], [], color=FAINT, linestyle="--", linewidth=1, label="dense in the same runtime")
    legend(figure, "outside lower left", columns)
    return figure
