"""What a person sees of a run while it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column

from dyntune.core.words import counted, duration, several
from dyntune.training.evaluate import Evaluation
from dyntune.training.interrupt import TrainingInterrupted

_SHORT = {"accuracy": "acc"}
"""Figures of merit as a narrow line names them."""
_FIRST, _SECONDS = 3, 2.0
"""Steps behind the first one, which takes longer, and the time that they took, before it is said how long all take."""


class Progress(Protocol):
    """Told about every step, evaluation and saved epoch of a run; a context manager around the whole.

    Derive from ``Silent`` to say something to some of it only.
    """

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        """Epoch ``epoch`` of ``epochs``, counted from 0, begins at step ``first`` of ``steps``."""

    def step(self, figures: dict[str, float]) -> None:
        """A step is done: its loss, loss terms, the task's figure of merit, activation and speed."""

    def evaluated(self, evaluation: Evaluation) -> None:
        """The epoch has been evaluated on the validation split."""

    def saved(self, epoch: int, folder: Path) -> None:
        """What a run is resumed from after ``epoch`` epochs, and that epoch's adapter, are on disk in ``folder``."""


@runtime_checkable
class CalibrationProgress(Protocol):
    """Told of what may come behind a run; a ``Progress`` need not be."""

    def calibrating(self, images: int, noun: str) -> None:
        """The training is over, and gates are calibrated for other rates, on so many images, or what ``noun`` says."""
        ...


class Silent:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None: ...

    def step(self, figures: dict[str, float]) -> None: ...

    def evaluated(self, evaluation: Evaluation) -> None: ...

    def saved(self, epoch: int, folder: Path) -> None: ...


class ProgressBar:
    """One bar for the run, with running means of the loss terms; one line per epoch when the output is no terminal.

    After the first steps a line says how long the training will take.

    Args:
        title: shown before the bar.
        console: where to write; standard error by default, so that standard output stays clean.
    """

    SMOOTHING = 0.9

    def __init__(self, title: str, console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}", table_column=Column(overflow="fold")),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}", table_column=Column(overflow="fold")),
        )
        self.bar = Bar(*columns, console=self.console, disable=not self.console.is_terminal)
        self.means: dict[str, float] = {}
        self.current: set[str] = set()
        """What the steps of the running epoch have told: not every term of a loss is in all of them."""
        self.validation = ""
        self.label = title
        self.task: Any = None
        self.left, self.timed, self.spent = 0, -1, 0.0
        self.mark = time.monotonic()
        self.estimated, self.shown = False, True

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if error[0] is None:
            self._line()

    def epoch(self, epoch: int, epochs: int, steps: int, first: int) -> None:
        if self.task is None:
            self.task = self.bar.add_task(self.title, total=epochs * steps, status="")
        self._line()
        self.current = set()
        self.label = f"{self.title} epoch {epoch + 1}/{epochs}"
        self.left, self.mark = (epochs - epoch) * steps - first, time.monotonic()
        self.bar.update(self.task, completed=epoch * steps + first, description=self.label)

    def step(self, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            old = self.means.get(name, value)
            self.means[name] = self.SMOOTHING * old + (1 - self.SMOOTHING) * value
        self.current |= figures.keys()
        self.shown = False
        self._estimate()
        self.bar.update(self.task, advance=1, status=f"{self._status()} {self.validation}".rstrip())

    def _estimate(self) -> None:
        """Says once how long the steps that are left will take, as soon as some of them tell."""
        now = time.monotonic()
        self.left, self.timed = self.left - 1, self.timed + 1
        self.spent += now - self.mark if self.timed else 0.0  # the first step takes longer
        self.mark = now
        if self.estimated or self.timed < _FIRST or self.spent < _SECONDS:
            return
        self.estimated = True
        if self.left > 0:
            about = f"about {duration(self.left * self.spent / self.timed)} for {counted(self.left, 'more step')}"
            self.say(f"{self.title}: {about}, evaluations aside")

    def evaluated(self, evaluation: Evaluation) -> None:
        self.validation = f"val {_SHORT.get(evaluation.merit, evaluation.merit)} {evaluation.score:.1%}"
        self.shown = False
        self._line(self.validation)

    def saved(self, epoch: int, folder: Path) -> None: ...

    def calibrating(self, images: int, noun: str) -> None:
        self.say(f"calibrating the gates for other rates on {counted(images, noun)}")

    def say(self, text: str) -> None:
        """Lines beside the bar, as they are."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def _line(self, validation: str = "") -> None:
        """Where the output is no terminal, a line about the epoch, unless it had one."""
        if not self.shown and not self.console.is_terminal:
            status = f"{self._status()} {validation}".strip()
            self.say(f"{self.label}: {status}")
        self.shown = True

    def _status(self) -> str:
        """The figures of the last steps; nothing in a run that goes on behind the last step of an epoch."""
        means = {name: value for name, value in self.means.items() if name in self.current}
        if not means:
            return ""
        terms = " ".join(f"{n.removeprefix('loss_')} {v:.3f}" for n, v in means.items() if n.startswith("loss"))
        activation = f" active {means['activation']:.0%}" if "activation" in means else ""
        merits = (n for n in means if n not in ("activation", "images_per_second") and not n.startswith("loss"))
        score = " ".join(f"{_SHORT.get(n, n)} {means[n]:.1%}" for n in merits)
        return f"{terms} {score}{activation} {means['images_per_second']:.0f} img/s"


def display(progress: Progress | bool | None, title: str) -> Progress:
    """What shows a run: what is given, a bar for True, nothing for False.

    None is a bar where a person looks on, in a terminal or a notebook, and nothing elsewhere.
    """
    if progress is not None and not isinstance(progress, bool):
        return progress
    console = Console(stderr=True, markup=False, emoji=False)
    looked_on = console.is_terminal or console.is_jupyter
    return ProgressBar(title, console) if (looked_on if progress is None else progress) else Silent()


class CountBar:
    """One bar for what is done one after another, with the time that is left; whoever stops it is told how far it was.

    Args:
        verb: what is done, ``predicting``.
        total: how often.
        noun: what is counted, ``images``.
        console: where to write.
    """

    def __init__(self, verb: str, total: int, noun: str, console: Console) -> None:
        self.total, self.noun = total, noun
        columns = (
            TextColumn(verb),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        # Where there is no terminal, a bar that nobody sees would leave an empty line.
        self.bar = Bar(*columns, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.bar.add_task("", total=total, status="")
        self.said = "nothing yet"

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self.bar.stop()
        if kind is KeyboardInterrupt:
            raise TrainingInterrupted(f"stopped; so far {self.said}.")

    def count(self, done: int, status: str = "") -> None:
        """So many are done."""
        self.said = f"{done} of {self.total} {self.noun}{', ' * bool(status)}{status}"
        self.bar.update(self.task, completed=done, status=status)


class EvaluationBar(CountBar):
    """The bar of an evaluation.

    Args:
        images: how many there are.
        merit: the figure that is shown.
        console: where to write.
        noun: what one of them is called.
    """

    def __init__(self, images: int, merit: str, console: Console, noun: str = "image") -> None:
        super().__init__("evaluating", images, several(noun), console)
        self.merit = merit

    def __call__(self, done: int, figures: dict[str, float]) -> None:
        self.count(done, f"{_SHORT.get(self.merit, self.merit)} {figures[self.merit]:.1%}")
