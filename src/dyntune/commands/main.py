"""The command line: one command per module of ``dyntune.commands``; exit status 0, 1 for an error, 2 for usage."""

from __future__ import annotations

import contextlib
import errno
import importlib
import inspect
import io
import json
import logging
import os
import pkgutil
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.text import Text
from typer.core import TyperCommand

from dyntune import commands
from dyntune.commands.console import err
from dyntune.core.errors import DyntuneError, TrainingError
from dyntune.core.limits import advice_for, limits_named
from dyntune.core.texts import printable
from dyntune.core.version import VERSION
from dyntune.data.datasets import SKIP
from dyntune.training.accelerator import launched_processes
from dyntune.training.interrupt import TrainingInterrupted

_TOGETHER = ("train",)
"""Commands that several processes, as torchrun starts them, run together; of others each would do and write all."""
_LOST = re.compile(r"connection (closed|reset)|broken pipe|\bgloo\b|\bnccl\b|TCPStore", re.IGNORECASE)
"""What torch says when a process that it talks to has ended."""

app = typer.Typer(
    help="Adapt pretrained Vision Transformers with few parameters, and skip the tokens that need no work.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut the names of options where the terminal is narrow
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        typer.echo(VERSION)
        raise typer.Exit
    if context.invoked_subcommand not in (None, *_TOGETHER) and launched_processes() > 1:
        raise TrainingError(
            f"dyntune {context.invoked_subcommand} runs in one process; start it without torchrun or accelerate launch."
        )


class _Command(TyperCommand):
    """A command that takes ``~`` for the home folder, knows an option's former name and says the new one, and is
    described in whole sentences in the list of all.
    """

    def get_short_help_str(self, limit: int = 45) -> str:
        return inspect.cleandoc(self.help or "").split("\n\n")[0].replace("\n", " ")

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


def _in_lines(example: str, width: int = 74) -> str:
    """An example in lines that fit, each but the last with a backslash, so that it can be copied."""
    lines = [""]
    for words in re.split(r"(?<= )(?=--)", example):
        if len(lines[-1]) + len(words) > width and lines[-1]:
            lines.append("    ")
        lines[-1] += words
    return "\n".join(f"  {line}" for line in "\\\n".join(lines).split("\n"))


for _info in pkgutil.iter_modules(commands.__path__):
    if _info.name not in ("clips", "common", "console", "main", "options", "pictures"):  # which commands share
        _module = importlib.import_module(f"{commands.__name__}.{_info.name}")
        _epilog = "\b\n" + "\n".join(("Examples:", *map(_in_lines, _module.EXAMPLES)))
        _hidden = getattr(_module, "HIDDEN", False)
        app.command(name=_info.name, cls=_Command, epilog=_epilog, hidden=_hidden)(_module.command)


class _Said(logging.Handler):
    """What the library has to say, on standard error as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        label = ("warning: ", "bold yellow") if record.levelno >= logging.WARNING else ""
        err.print(Text.assemble(label, record.getMessage()), highlight=False, soft_wrap=True)


def main() -> None:
    """Entry point of the ``dyntune`` program."""
    said = _Said()
    logging.getLogger("dyntune").addHandler(said)
    _open_streams()
    try:
        with limits_named():
            _run()
    except (DyntuneError, OSError) as error:
        # An error in a worker process arrives with that process's traceback around it.
        text = _told(error)
        if "Original Traceback" in text:
            text = text.rpartition("Error: ")[2]
        options = _options_of(sys.argv[1:])
        text = advice_for(text if "--on-corrupt" in options else text.replace(SKIP, ""), options)
        words = "\n".join(map(printable, text.strip().split("\n")))
        if isinstance(error, TrainingInterrupted):
            _fail(words, f"next: {_going_on(sys.argv[1:])}", label=None)
        _fail(words)
    except RuntimeError as error:
        if launched_processes() == 1 or not _LOST.search(str(error)):
            raise
        # torchrun's report is of the process that failed first, to the second: that is the other one.
        _fail("another of the processes that train together has ended; what it says is the reason.", behind=1)
    finally:
        logging.getLogger("dyntune").removeHandler(said)


def _told(error: Exception) -> str:
    """What an error says; of one of the system about a path, what the path is."""
    name = getattr(error, "filename", None)
    if not isinstance(error, OSError) or not isinstance(name, str | bytes):
        return str(error)
    return f"{os.fsdecode(name)}: {error.strerror}. Give another path, or see that this one can be read and written."


def _options_of(arguments: list[str]) -> set[str]:
    """The options of the command that was given."""
    command = typer.main.get_command(app)
    given = next((own for name in arguments if (own := getattr(command, "commands", {}).get(name))), None)
    return {option for parameter in (given.params if given else ()) for option in parameter.opts}


def _run() -> None:
    """The command, and that what it has printed arrives."""
    try:
        app()
    except SystemExit:
        # The library of the command line ends so, without a word, where nobody reads standard output any more.
        closed = type(sys.stdout).__name__ == "PacifyFlushWrapper"
        try:
            sys.stdout.flush()
        except OSError as error:
            closed = closed or error.errno == errno.EPIPE
            with contextlib.suppress(OSError):  # so that Python, at its end, does not try and complain again
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            if not closed:
                raise
        if not closed:
            raise
        _fail("standard output was closed before everything was printed; what a command writes to files is there.")


def _open_streams() -> None:
    """Standard streams that are closed are opened on nothing: the next file would take their place."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if number == 0 else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal or a file cannot show is written in another way; it must not end the work.
            stream.reconfigure(errors="backslashreplace")


def _fail(text: str, then: str | None = None, behind: int = 0, label: str | None = "error:") -> NoReturn:
    """Ends the program with an error, or what ``label`` says, and perhaps a line that says what to do next.

    Args:
        text: what has happened.
        then: the line.
        behind: seconds that other processes are ahead.
        label: in front of the text; None where nothing is wrong.
    """
    if label is not None:
        err.print(label, style="bold red", end=" ")
    err.print(text, highlight=False, soft_wrap=True)
    if then is not None:
        err.print(then, highlight=False, soft_wrap=True)
    # torchrun ends with a report of its own, whose last line comes from this file.
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        told = {"py_callstack": " ".join(filter(None, (label, text))), "timestamp": str(int(time.time()) + behind)}
        Path(report).write_text(json.dumps({"message": {"message": text, "extraInfo": told}}), encoding="utf-8")
    sys.stderr.flush()
    if torch.distributed.is_initialized():
        # The others may wait for this process for ever; they are not waited for.
        os._exit(1)
    sys.exit(1)


def _going_on(arguments: list[str]) -> str:
    """The command that continues an interrupted one: the same, with ``--resume`` where there is such an option."""
    command: Any = typer.main.get_command(app)
    options = [option for parameter in command.commands[arguments[0]].params for option in parameter.opts]
    resumes = "--resume" in options and "--resume" not in arguments
    return shlex.join(["dyntune", *arguments, *(["--resume"] if resumes else [])])


if __name__ == "__main__":
    main()
