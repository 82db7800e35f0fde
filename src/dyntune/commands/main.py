"""The command line: one command per module of ``dyntune.commands``; exit status 0, 1 for an error, 2 for usage."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dyntune import commands
from dyntune.commands.common import err
from dyntune.core.errors import DyntuneError
from dyntune.core.version import VERSION
from dyntune.training.interrupt import TrainingInterrupted

app = typer.Typer(
    help="Adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options where the terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


class _Command(TyperCommand):
    """A command that still knows an option's former name, and is described in whole sentences in the list of all."""

    def get_short_help_str(self, limit: int = 45) -> str:
        return inspect.cleandoc(self.help or "").split("\n\n")[0].replace("\n", " ")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(argument.partition("=")[0] == "--tokens" for argument in args):
            err.print("--tokens is now called --policy", highlight=False)
            args = [re.sub(r"^--tokens(?==|$)", "--policy", argument) for argument in args]
        return super().parse_args(ctx, args)


def _in_lines(example: str, width: int = 74) -> str:
    """An example in lines that fit, each but the last with a backslash, so that it can be copied."""
    lines = [""]
    for words in re.split(r"(?<= )(?=--)", example):
        if len(lines[-1]) + len(words) > width and lines[-1]:
            lines.append("    ")
        lines[-1] += words
    return "\n".join(f"  {line}" for line in "\\\n".join(lines).split("\n"))


for _info in pkgutil.iter_modules(commands.__path__):
    if _info.name not in ("common", "main", "options"):
        _module = importlib.import_module(f"{commands.__name__}.{_info.name}")
        _epilog = "\b\n" + "\n".join(("Examples:", *map(_in_lines, _module.EXAMPLES)))
        _hidden = getattr(_module, "HIDDEN", False)
        app.command(name=_info.name, cls=_Command, epilog=_epilog, hidden=_hidden)(_module.command)


def main() -> None:
    """Entry point of the ``dyntune`` program."""
    try:
        app()
    except (DyntuneError, OSError) as error:
        # An error in a worker process arrives with that process's traceback around it.
        text = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)
        err.print("error:", style="bold red", end=" ")
        err.print(text.strip(), markup=False, highlight=False, soft_wrap=True)
        if isinstance(error, TrainingInterrupted):
            err.print(f"next: {_going_on(sys.argv[1:])}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _going_on(arguments: list[str]) -> str:
    """The command that continues an interrupted one: the same, with ``--resume`` where there is such an option."""
    command: Any = typer.main.get_command(app)
    options = [option for parameter in command.commands[arguments[0]].params for option in parameter.opts]
    resumes = "--resume" in options and "--resume" not in arguments
    return shlex.join(["dyntune", *arguments, *(["--resume"] if resumes else [])])


if __name__ == "__main__":
    main()
