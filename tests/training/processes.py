"""``dyntune`` in processes of its own, to which signals are sent."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

from dyntune.commands.main import main


class Command:
    """A running ``dyntune``; it begins as a copy of a process that has imported everything, which takes seconds.

    Args:
        words: of the command line, without ``dyntune``.
        errors: the file that its standard error goes to.
        environment: variables that it has besides.
    """

    def __init__(self, words: list[str], errors: Path, **environment: str) -> None:
        self.errors = errors
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([main.__module__])
        self._process = context.Process(target=_run, args=(words, errors, environment), daemon=True)
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self, seconds: float = 120) -> tuple[int, str]:
        """Waits for the end: the exit status, less than 0 for a signal, and what it wrote to standard error."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds:g} seconds"
        return self._process.exitcode, self.errors.read_text()


def _run(words: list[str], errors: Path, environment: dict[str, str]) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["dyntune", *words]
    main()
