"""The display of a search while it goes on: a bar on a terminal, lines elsewhere, or nothing."""

from __future__ import annotations

from typing import Protocol, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dyntune.studies.noah.evolution import Candidate, SearchSettings


class SearchProgress(Protocol):
    """Told about every candidate; a context manager around the search."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def candidate(self, candidate: Candidate, best: Candidate) -> None:
        """A candidate has been evaluated; ``best`` is the best one so far."""


class SilentSearch:
    """Shows nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def candidate(self, candidate: Candidate, best: Candidate) -> None: ...


class SearchBar:
    """One bar for the search; one line per generation when the output is no terminal.

    Args:
        settings: of the search.
        console: where to write; standard error by default, so that standard output stays clean.
    """

    def __init__(self, settings: SearchSettings, console: Console | None = None) -> None:
        self.settings = settings
        self.console = console or Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self.bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.bar.add_task("search", total=settings.population * settings.generations, status="")
        self.generation = 0
        self.status = ""

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        if error[0] is None:
            self._line()

    def candidate(self, candidate: Candidate, best: Candidate) -> None:
        if candidate.generation != self.generation:
            self._line()
        self.generation = candidate.generation
        self.status = f"best val acc {best.accuracy:.1%} with {best.parameters / 1e6:.3f} M parameters"
        self.bar.update(self.task, advance=1, description=self._title(), status=self.status)

    def _title(self) -> str:
        return f"search generation {self.generation + 1}/{self.settings.generations}"

    def _line(self) -> None:
        if not self.console.is_terminal:
            self.console.print(f"{self._title()}: {self.status}", highlight=False, soft_wrap=True)
