"""The command line: one command per module of ``dyntune.commands``; exit status 0, 1 for an error, 2 for usage."""

from __future__ import annotations

import importlib
import io
import logging
import pkgutil
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from dyntune import commands
from dyntune.commands.common import err
from dyntune.core.errors import DyntuneError
from dyntune.core.texts import printable
from dyntune.core.version import VERSION
from dyntune.data.datasets import SKIP

app = typer.Typer(
    help="Adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit


class _Command(TyperCommand):
    """A command that takes ``~`` for the home folder, and still knows an option's former name and says the new one."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if any(argument.partition("=")[0] == "--tokens" for argument in args):
            err.print("--tokens is now called --policy", highlight=False)
            args = [re.sub(r"^--tokens(?==|$)", "--policy", argument) for argument in args]
        rest = super().parse_args(ctx, args)
        # The shell has done so for most, but not for --out=~/runs.
        ctx.params = {name: _home(value) for name, value in ctx.params.items()}
        return rest


def _home(value: Any) -> Any:
    """A path whose ``~`` is the home folder; anything else as it is."""
    try:
        return value.expanduser() if isinstance(value, Path) else value
    except RuntimeError as error:  # there is no such user
        raise typer.BadParameter(f"{value}: {error}") from None


for _info in pkgutil.iter_modules(commands.__path__):
    if _info.name not in ("common", "main", "options"):
        _module = importlib.import_module(f"{commands.__name__}.{_info.name}")
        _epilog = "\n\n".join(("Examples:", *_module.EXAMPLES))
        _hidden = getattr(_module, "HIDDEN", False)
        app.command(name=_info.name, cls=_Command, epilog=_epilog, hidden=_hidden)(_module.command)


class _Said(logging.Handler):
    """What the library has to say, on standard error as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        err.print(record.getMessage(), highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the ``dyntune`` program."""
    said = _Said()
    logging.getLogger("dyntune").addHandler(said)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal or a file cannot show is written in another way; it must not end the work.
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (DyntuneError, OSError) as error:
        # An error in a worker process arrives with that process's traceback around it.
        text = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)
        if "--on-corrupt" not in _options_of(sys.argv[1:]):
            text = text.replace(SKIP, "")
        err.print("error:", style="bold red", end=" ")
        err.print("\n".join(map(printable, text.strip().split("\n"))), highlight=False, soft_wrap=True)
        sys.exit(1)
    finally:
        logging.getLogger("dyntune").removeHandler(said)


def _options_of(arguments: list[str]) -> set[str]:
    """The options of the command that was given."""
    command = typer.main.get_command(app)
    given = next((own for name in arguments if (own := getattr(command, "commands", {}).get(name))), None)
    return {option for parameter in (given.params if given else ()) for option in parameter.opts}


if __name__ == "__main__":
    main()
