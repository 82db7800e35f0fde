"""``dyntune`` in processes of its own, to which signals are sent."""

import multiprocessing
import multiprocessing.util
import os
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyntune.commands.main import main
from dyntune.training.progress import ProgressBar


class Command:
    """A running ``dyntune``; it begins as a copy of a process that has imported everything, which takes seconds.

    Args:
        words: of the command line, without ``dyntune``.
        errors: the file that its standard error goes to.
        fate: what becomes of it on its way, called first, in the process.
        environment: variables that it has besides.
    """

    def __init__(
        self, words: list[str], errors: Path, fate: Callable[[], object] | None = None, **environment: str
    ) -> None:
        self.errors = errors
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([main.__module__])
        self._process = context.Process(target=_run, args=(words, errors, fate, environment), daemon=True)
        self._process.start()

    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self, seconds: float = 600) -> tuple[int, str]:
        """Waits for the end: the exit status, less than 0 for a signal, and what it wrote to standard error."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still running after {seconds:g} seconds"
        return self._process.exitcode, self.errors.read_text()


@dataclass(frozen=True)
class KilledAt:
    """Kills the process when it opens, renames, makes or removes a file in a folder for the n-th time; or counts them.

    Args:
        folder: whose files count.
        number: of the event, from 1; 0 kills nothing.
        count: file that the number of events is written to at the end.
    """

    folder: Path
    number: int = 0
    count: Path | None = None

    def __call__(self) -> None:
        seen, own = 0, os.getpid()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal seen
            if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir") or os.getpid() != own:
                return
            if any(isinstance(word, str) and word.startswith(str(self.folder)) for word in arguments):
                seen += 1
                if seen == self.number:
                    os.kill(own, signal.SIGKILL)

        sys.addaudithook(hook)
        if self.count is not None:
            file = self.count
            multiprocessing.util.Finalize(None, lambda: file.write_text(str(seen)), exitpriority=100)


@dataclass(frozen=True)
class SignalAt:
    """Sends the process a signal in a step of its training.

    Args:
        step: number of the step, from 1, over all epochs.
        number: of the signal.
    """

    step: int
    number: signal.Signals

    def __call__(self) -> None:
        seen, step = 0, ProgressBar.step

        def counted(bar: ProgressBar, figures: dict[str, float]) -> None:
            nonlocal seen
            seen += 1
            if seen == self.step:
                os.kill(os.getpid(), self.number)
            step(bar, figures)

        ProgressBar.step = counted  # type: ignore[method-assign]


@dataclass(frozen=True)
class NoRoom:
    """Lets no file become larger than so many bytes, as on a disk that fills up while it is written."""

    bytes: int

    def __call__(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))


def _run(words: list[str], errors: Path, fate: Callable[[], object] | None, environment: dict[str, str]) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), sys.stderr.fileno())
    os.environ.update(environment)
    torch.set_num_threads(1)
    sys.argv = ["dyntune", *words]
    if fate is not None:
        fate()
    main()
