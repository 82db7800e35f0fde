"""A measurement as people read it: a table like the paper's Table 4, one with every figure, and files of both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dyntune.core.files import write_json, write_text
from dyntune.studies.bench.picture import speed_figure
from dyntune.studies.bench.run import Report
from dyntune.studies.pictures import save_figure

DETAILS = (
    "runtime",
    "batch",
    "method",
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

    Where gates are set anew for each batch size, MACs are those at the last one; they differ by less than a patch.
    """
    cells = {(row.runtime, row.batch_size, row.name): row for row in report.rows}
    last = {row.name: row for row in report.rows}
    places = list(dict.fromkeys((row.runtime, row.batch_size, row.device) for row in report.rows))
    columns = (
        "method",
        "active",
        "GMACs",
        "of dense",
        *(f"{runtime}, {device}, batch {batch}" for runtime, batch, device in places),
    )
    rows = []
    for name, row in last.items():
        speeds = [cells.get((runtime, batch, name)) for runtime, batch, _ in places]
        rows.append(
            (
                name,
                "-" if row.active is None else f"{row.active:.1%}",
                f"{row.macs / 1e9:.3f}",
                f"{1 / row.macs_ratio:.1%}",
                *(f"{s.images_per_second.median:,.1f} ({s.speedup.median:.2f} x)" if s else "-" for s in speeds),
            )
        )
    return columns, rows


def details(report: Report) -> list[tuple[str, ...]]:
    """Every figure as text, under ``DETAILS``."""
    return [
        (
            row.runtime,
            str(row.batch_size),
            row.name,
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


def write(report: Report, folder: Path) -> None:
    """Writes ``results.json``, ``results.md`` with both tables, and ``speed.png`` to a folder."""
    columns, rows = summary(report)
    notes = "\n".join(f"- {note}" for note in report.notes)
    tables = f"{_markdown(columns, rows)}\n\n{_markdown(DETAILS, details(report))}"
    write_json(folder / "results.json", report.to_dict())
    write_text(folder / "results.md", f"# {report.title}\n\n{tables}\n\n{notes}\n\n![Speed-up](speed.png)\n")
    save_figure(speed_figure(report), folder / "speed.png")


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
