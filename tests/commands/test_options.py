"""Options of the commands that fill settings: which there are, what they take, and what they are by default."""

import importlib
import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from dyntune.commands.main import app
from dyntune.commands.options import Options, with_options
from dyntune.core.fields import Range
from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab.recipes import find_recipe

RECORDED = json.loads((Path(__file__).parent / "options.json").read_text(encoding="utf-8"))
"""Command -> its parameters by name; changed by hand when an option is added, removed or changed."""


def described(parameter, annotation):
    """What decides how a parameter is given and what comes of it: all but its help."""
    hint, info = get_args(annotation)
    types = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    literals = [hint] if get_origin(hint) is Literal else [kind for kind in types if get_origin(kind) is Literal]
    what = {
        "flags": [*parameter.opts, *parameter.secondary_opts],
        "type": "choice" if literals else "/".join(kind.__name__ for kind in types),
        "choices": list(get_args(literals[0])) if literals else None,
        "range": None if info.min is info.max is None else [info.min, info.max],
        "required": parameter.required,
        "default": parameter.default,
    }
    return {name: value for name, value in what.items() if value is not None}


def options_of(command):
    """The parameters of a command by name, as typer and its signature have them."""
    function = importlib.import_module(f"dyntune.commands.{command}").command
    signature = inspect.signature(function, eval_str=True).parameters
    parameters = typer.main.get_command(app).commands[command].params
    return {p.name: described(p, signature[p.name].annotation) for p in parameters if p.name != "help"}


@pytest.mark.parametrize("command", RECORDED)
def test_options_are_those_that_were_recorded(command):
    assert json.loads(json.dumps(options_of(command))) == RECORDED[command]


class Reached(Exception):
    """Raised in place of the work that a command does, with what the work was asked for."""


def reached(monkeypatch, target, *arguments):
    """What ``target`` is called with by a command, as positional and keyword arguments."""

    def stop(*given, **named):
        raise Reached(given, named)

    monkeypatch.setattr(target, stop)
    result = CliRunner().invoke(app, list(arguments))
    assert isinstance(result.exception, Reached), result.output
    return result.exception.args


def test_train_fills_its_settings(monkeypatch, tmp_path):
    options = ("--lr", "1e-6", "--grad-checkpointing", "--no-decay-1d", "--log-every", "3", "--device", "cpu")
    _, named = reached(
        monkeypatch, "dyntune.commands.train.fit", "train", "digits", "--out", str(tmp_path / "run"), *options
    )
    settings = named["settings"]
    assert (settings.lr, settings.min_lr) == (1e-6, 1e-6), "the end of the cosine is lowered too"
    assert (settings.gradient_checkpointing, settings.decay_1d, settings.log_every) == (True, False, 3)
    assert (settings.device, settings.batch_size, settings.select) == ("cpu", 64, "val")


def test_images_that_cannot_be_read_may_be_left_out_wherever_data_are_given(monkeypatch, tmp_path):
    skip = ("--on-corrupt", "skip")
    _, named = reached(
        monkeypatch, "dyntune.commands.compare.load_data", *("compare", "digits", "--methods", "linear"), *skip,
        *("--out", str(tmp_path)),
    )  # fmt: skip
    assert named == {"on_corrupt": "skip"}
    given, _ = reached(monkeypatch, "dyntune.commands.bench.estimate", "bench", "--data", "digits", *skip)
    assert given[0].on_corrupt == "skip"
    monkeypatch.setattr("dyntune.commands.export.load", lambda run, **options: SimpleNamespace(classes=None))
    monkeypatch.setattr("dyntune.commands.export.apply_rate", lambda *given: None)
    _, named = reached(
        monkeypatch, "dyntune.commands.export.load_held", *("export", "run", "--check", "digits"), *skip,
        *("--out", str(tmp_path / "out")),
    )  # fmt: skip
    assert named == {"classes": None, "on_corrupt": "skip"}


def test_noah_fills_three_kinds_of_settings(monkeypatch, tmp_path):
    options = ("--population", "9", "--crossovers", "2", "--supernet-epochs", "7", "--batch-size", "8")
    given, named = reached(
        monkeypatch, "dyntune.commands.noah.train_noah", "noah", "digits", "--out", str(tmp_path / "run"), *options
    )
    assert named["search"] == SearchSettings(population=9, mutations=4, crossovers=2)
    assert (named["supernet_epochs"], named["supernet_lr"]) == (7, 5e-4)
    settings = given[-1]
    assert (settings.epochs, settings.batch_size, settings.decay_1d, settings.select) == (100, 8, False, "last")


def test_vtab_leaves_the_recipe_what_is_not_given(monkeypatch, tmp_path):
    options = ("--recipe", "fact", "--epochs", "10", "--readers", "2", "--population", "7", "--workers", "3")
    command = ("vtab", "vtab-mini", "--methods", "linear", "--out", str(tmp_path / "run"), "--device", "cpu")
    monkeypatch.setattr("dyntune.commands.vtab.open_benchmark", lambda root: pytest.fail("not needed"))
    _, changes = reached(monkeypatch, "dyntune.studies.vtab.recipes.Recipe.changed", *command, *options)
    monkeypatch.undo()
    recipe = find_recipe("fact").changed(**changes)
    assert (recipe.settings.epochs, recipe.settings.warmup_epochs, recipe.settings.lr) == (10, 1, 1e-3)
    assert (recipe.settings.workers, recipe.settings.select, recipe.drop_path) == (2, "last", 0.1)
    assert recipe.noah == SearchSettings(population=7, mutations=3, crossovers=3)


@dataclass(frozen=True)
class Walk:
    """A walk.

    Args:
        steps: how many ``steps``.
        pace: of the walk.
        back: whether it ends where it began.
        alone: ``alone`` or not.
        places: where it leads.
    """

    steps: Annotated[int, Range(1, 9)] = 3
    pace: Literal["slow", "fast"] = "slow"
    back: bool = True
    alone: bool = False
    places: tuple[str, ...] = ()


def walk(*arguments, **changes):
    """What a command is given for ``Walk``, or the output of the command that refuses."""
    given = []

    @with_options
    def command(name: str, *, walk: Annotated[Walk, Options(Walk, **changes)], times: int = 1) -> None:
        given.append((name, walk, times))

    program = typer.Typer()
    program.command()(command)
    result = CliRunner().invoke(program, list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    return given[0] if given else result.output


FIELDS = ("steps", "pace", "back", "alone")


def test_every_field_is_an_option():
    assert walk("me", only=FIELDS) == ("me", Walk(), 1)
    arguments = ("--steps", "5", "--pace", "fast", "--no-back", "--alone", "--times", "2")
    assert walk("me", *arguments, only=FIELDS) == ("me", Walk(5, "fast", False, True), 2)


def test_a_command_may_have_other_names_and_defaults():
    changes = {"only": ("steps", "alone"), "names": {"alone": "by_myself"}, "defaults": {"steps": 4}}
    assert walk("me", "--by-myself", **changes)[1] == Walk(4, alone=True)
    assert walk("me", only=("steps", "pace"), unset={"pace": "yours"}, make=dict)[1] == {"steps": 3, "pace": None}


def test_help_has_the_descriptions_ranges_and_what_none_stands_for():
    shown = " ".join(walk("--help", only=FIELDS, unset={"steps": "as many as it takes"}).split())
    for words in (
        "How many steps.",
        "Whether it ends where it began.",
        "1<=x<=9",
        "as many as it takes",
        "alone or not.",
        "--no-back",
    ):
        assert words in shown
    assert "--no-alone" not in shown


@pytest.mark.parametrize("arguments", [("--steps", "0"), ("--steps", "10"), ("--pace", "none"), ("--places", "home")])
def test_typer_refuses_what_a_field_does_not_take(arguments):
    assert "Usage" in walk("me", *arguments, only=FIELDS)
