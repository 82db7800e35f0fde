"""What the commands print: tables, JSON, and what to do next; results on standard output, all else beside it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dyntune.core.texts import printable

_PIPED_WIDTH = None if sys.stdout is not None and sys.stdout.isatty() else 160
"""A table in a file or a log need not fit a terminal of 80."""
# Names of files and classes are part of what is printed, and their brackets and colons mean nothing.
out = Console(width=_PIPED_WIDTH, markup=False, emoji=False)
err = Console(stderr=True, markup=False, emoji=False)


def space() -> None:
    """An empty line on standard error: between what begins, what goes on, and what has come of it."""
    err.print()


def print_json(data: Any) -> None:
    """One JSON object on standard output, in ASCII where that cannot show all of its signs."""
    text = json.dumps(data, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=2)
    typer.echo(text)


def print_next(line: str) -> None:
    """What to do next, as a line that runs as it stands; it is never broken, so that it can be copied."""
    out.print(f"next: {line}", highlight=False, markup=False, soft_wrap=True)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table for people, of which nothing is cut however narrow the terminal; the first column names the row.

    Cells are broken at spaces, and names behind the separators of a spec or path. Where that is not enough, a row's
    figures stand under its name, each with its column's title.
    """
    title, rows = printable(title), [tuple(map(printable, row)) for row in rows]
    cells = [columns, *rows]
    least = [max(cell_len(piece.rstrip()) for row in cells for piece in _pieces(row[i])) for i in range(len(columns))]
    most = [max(cell_len(row[i]) for row in cells) for i in range(len(columns))]
    room = out.width - sum(least) - 3 * len(columns) - 1
    _print_whole(title, "italic")
    if room < 0:
        for row in rows:
            _print_whole(row[0], "bold")
            named = [f"{column} {cell}".strip() for column, cell in zip(columns[1:], row[1:], strict=True) if cell]
            for line in _filled([f"  {one}" for one in named], out.width):
                _print_whole(line)
        return
    widths = list(least)
    wanting = sorted(range(len(columns)), key=lambda i: most[i] - least[i])
    for place, i in enumerate(wanting):
        more = min(most[i] - least[i], room // (len(wanting) - place))
        widths[i], room = widths[i] + more, room - more
    table = Table()
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        table.add_column(Text(_fold(column, width)), justify="left" if index == 0 else "right", width=width)
    for row in rows:
        table.add_row(*(Text(_fold(cell, width)) for cell, width in zip(row, widths, strict=True)))
    out.print(table)


def _print_whole(text: str, style: str | None = None) -> None:
    """A line that the terminal breaks where it likes, and that can be copied whole."""
    out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _pieces(text: str) -> list[str]:
    """The pieces of a cell that may stand in a line each: words, figures with their unit, parts of specs and paths."""
    return re.split(r"(?<= )(?!(?:[kMGx%]|kB|ms)(?:\W|$))|(?<=[,+/])(?=[^\W\d])", text)


def _filled(pieces: Sequence[str], width: int) -> list[str]:
    """Lines of as many pieces as fit, at least one each."""
    lines = [""]
    for piece in pieces:
        if lines[-1] and cell_len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return [line.rstrip() for line in lines]


def _fold(text: str, width: int) -> str:
    return "\n".join(_filled(_pieces(text), width))
