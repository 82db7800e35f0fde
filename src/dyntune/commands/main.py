"""The command line: one command per module of ``dyntune.commands``; exit status 0, 1 for an error, 2 for usage."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from typing import Annotated

import typer

from dyntune import commands
from dyntune.commands.common import err
from dyntune.core.errors import DyntuneError
from dyntune.core.version import VERSION

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


for _info in pkgutil.iter_modules(commands.__path__):
    if _info.name not in ("common", "main", "options"):
        _module = importlib.import_module(f"{commands.__name__}.{_info.name}")
        _epilog = "\n\n".join(("Examples:", *_module.EXAMPLES))
        app.command(name=_info.name, epilog=_epilog, hidden=getattr(_module, "HIDDEN", False))(_module.command)


def main() -> None:
    """Entry point of the ``dyntune`` program."""
    try:
        app()
    except (DyntuneError, OSError) as error:
        # An error in a worker process arrives with that process's traceback around it.
        text = str(error).rpartition("Error: ")[2] if "Original Traceback" in str(error) else str(error)
        err.print("error:", style="bold red", end=" ")
        err.print(text.strip(), markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
