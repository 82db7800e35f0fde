"""Options of the commands that fill settings: which there are, what they take, and what they are by default."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Literal, get_args, get_origin

import pytest
import typer

from dyntune.commands.main import app

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
