"""What commands print in terminals of 80 and 120 columns: nothing that names a row, and no figure, is cut."""

import io
import re
from contextlib import redirect_stdout

import pytest
import typer.main
from rich.console import Console
from typer.testing import CliRunner

from dyntune.commands import console, cost
from dyntune.commands.main import app
from dyntune.studies.report import _COLUMNS, _SPEED_COLUMNS
from dyntune.studies.vtab.tasks import VTAB_1K
from dyntune.training.evaluate import Evaluation
from dyntune.training.progress import ProgressBar

COMMANDS = typer.main.get_command(app).commands
LONG = "dyt:rate=0.5,recipe=published,scale=1,rate_of=inference,rate_weight=10+tome:r=2"
WIDTHS = pytest.mark.parametrize("width", [80, 120])


@pytest.fixture
def printed(width, monkeypatch):
    """``printed(function, *arguments)`` is what it prints in a terminal of ``width`` columns."""
    monkeypatch.setattr(console, "out", Console(width=width))

    def in_a_terminal(function, *arguments) -> str:
        said = io.StringIO()
        with redirect_stdout(said):
            function(*arguments)
        return said.getvalue()

    return in_a_terminal


def whole(text: str, width: int, rows) -> None:
    """Every word of every cell is there, and what stands in a frame fits the terminal."""
    assert "…" not in text
    assert all(len(line) <= width for line in text.splitlines() if line[:1] in "┏┃┡│└")
    words = set(re.findall(r"[^\s│┃]+", text))
    pieces = {piece.strip() for row in rows for cell in row for piece in console._pieces(cell)}
    for piece in pieces - {""}:
        assert set(piece.split()) <= words or piece in text, piece


TABLES = {
    "key and value": (("", ""), [("accuracy", "99.16%"), ("active in blocks.11.mlp", "49.8%")]),
    "methods": (
        ("method", "test accuracy", *_COLUMNS, *_SPEED_COLUMNS),
        [
            ("linear", "98.32%", "0", "4 kB", "97.07 M", "100.0%", "-", "1,531", "0.97 x"),
            (LONG, "98.99%", "1,353,312", "5,413 kB", "69.73 M", "71.8%", "49.8%", "1,611", "1.13 x"),
        ],
    ),
    "vtab": (
        ("method", *(task.title for task in VTAB_1K.tasks), "Mean"),
        [(LONG, *(f"{40 + index}.1 ± 0.{index % 10}" for index in range(len(VTAB_1K.tasks))), "71.40 ± 0.30")],
    ),
    "images": (
        ("image", "1", "2"),
        [("holidays/a-very-long-folder/IMG_20260704_123456.jpg", "tulip 99.1%", "rose 0.8%")],
    ),
}


@WIDTHS
@pytest.mark.parametrize("table", TABLES)
def test_no_cell_of_a_table_is_cut(table, width, printed):
    columns, rows = TABLES[table]
    text = printed(console.print_table, "digits with a model of a long name", columns, rows)
    whole(text, width, rows)
    assert "digits with a model of a long name" in text
    figures = [cell for row in rows for cell in row[1:] if " " not in cell]
    assert all(figure in text for figure in figures)  # and none is broken


@WIDTHS
def test_a_table_that_fits_is_one(width, printed):
    columns, rows = TABLES["methods"]
    text = printed(console.print_table, "digits", columns, rows)
    assert ("┃" in text) == (width == 120)
    assert "1.13 x" in text and "69.73 M" in text


@WIDTHS
def test_a_command_prints_whole_tables(width, printed, monkeypatch):
    seen = []
    monkeypatch.setattr(cost, "out", console.out)
    monkeypatch.setattr(
        cost, "print_table", lambda title, columns, rows: (seen.append(rows), console.print_table(title, columns, rows))
    )
    text = CliRunner().invoke(app, ["cost", "--method", "dyt", "--per-block"]).stdout
    assert len(seen) == 2
    for rows in seen:
        whole(text, width, rows)


@WIDTHS
@pytest.mark.parametrize("name", [name for name, command in COMMANDS.items() if not command.hidden])
def test_help_names_every_option_and_fits(name, width):
    text = CliRunner().invoke(app, [name, "--help"], terminal_width=width).output
    assert "…" not in text and all(len(line) <= width for line in text.splitlines())
    for parameter in COMMANDS[name].params:
        assert all(option in text for option in (*parameter.opts, *parameter.secondary_opts)), parameter.opts


@WIDTHS
def test_the_list_of_commands_describes_each_in_a_whole_sentence(width):
    text = " ".join(CliRunner().invoke(app, ["--help"], terminal_width=width).output.split())
    assert "..." not in text.replace("[ARGS]...", "")
    for name, command in COMMANDS.items():
        assert command.hidden or f"{name} {command.get_short_help_str()}" in text


def test_a_run_that_goes_on_behind_the_last_step_of_an_epoch_has_validation_alone_to_show():
    log = io.StringIO()
    with ProgressBar("dyt", Console(file=log, width=80)) as bar:
        bar.epoch(0, 2, 1, 1)
        bar.evaluated(Evaluation(4, {"accuracy": 0.75}, 1.0, {}, None))
    assert "dyt epoch 1/2: val acc 75.0%" in log.getvalue()


@WIDTHS
def test_the_line_of_a_training_shows_every_figure(width):
    screen = io.StringIO()
    console = Console(file=screen, width=width, force_terminal=True, legacy_windows=False)
    with ProgressBar(LONG, console) as bar:
        bar.epoch(0, 30, 100, 0)
        bar.step(
            {"loss_task": 1.234, "loss_rate": 0.456, "loss_complete": 0.321, "accuracy": 0.9, "activation": 0.5}
            | {"images_per_second": 123.4}
        )
        bar.bar.refresh()
    text = screen.getvalue()
    assert "…" not in text
    for figure in ("1.234", "0.456", "0.321", "90.0%", "50%", "123", "epoch 1/30", "1/3000"):
        assert figure in text, figure
