"""What a person sees of a benchmark while it runs: jobs, accuracy so far, and the time that is left."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dyntune.studies.vtab.jobs import Outcome
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.results import read_failure, read_result, read_search


class JobDisplay:
    """A bar over all jobs and one for each that runs; one line per finished job when the output is no terminal.

    Args:
        plan: the benchmark.
        jobs: all that are asked for, those that are finished already among them.
        todo: those that are run now.
        workers: how many run at once.
        console: where to write; standard error by default, so that standard output stays clean.
    """

    def __init__(
        self, plan: Plan, jobs: Sequence[Job], todo: Sequence[Job], workers: int, console: Console | None = None
    ) -> None:
        self.plan, self.jobs, self.workers = plan, list(jobs), workers
        self.console = console or Console(stderr=True)
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.running: dict[Job, TaskID] = {}
        self.left = set(todo)
        self.total = self.bar.add_task("jobs", total=len(self.jobs), status="")

    def __enter__(self) -> Self:
        self.bar.start()
        self._refresh()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()

    def begun(self, job: Job) -> None:
        self.running[job] = self.bar.add_task(escape(str(job)), total=100, status="")

    def share(self, job: Job, done: float) -> None:
        self.bar.update(self.running[job], completed=round(100 * done))

    def ended(self, job: Job, outcome: Outcome) -> None:
        self.bar.remove_task(self.running.pop(job))
        self.left.discard(job)
        self._refresh()
        count = f"{len(self.jobs) - len(self.left)}/{len(self.jobs)}"
        words = {"done": self._result(job), "taken": "another command is at it"}
        if outcome == "failed":
            failure = read_failure(job, self.plan.out)
            words["failed"] = f"failed: {failure.error if failure else 'no record'}"
        line = "; ".join(filter(None, (f"{count} {job}: {words[outcome]}", self._remaining() if self.left else "")))
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _refresh(self) -> None:
        done = len(self.jobs) - len(self.left)
        self.bar.update(self.total, completed=done, status=f"{self._accuracies()} {self._remaining()}".strip())

    def _result(self, job: Job) -> str:
        if job.seed is None:
            search = read_search(job, self.plan.out)
            if search is None:
                return "no result"
            scale = "" if search.scale is None else f", scale {search.scale:g}"
            return f"lr {search.lr:.2g}{scale}, {search.accuracy:.1%} on val200"
        result = read_result(job, self.plan.out)
        return "no result" if result is None else f"{result.accuracy:.2%}, {result.seconds:.0f} s"

    def _accuracies(self) -> str:
        """Mean accuracy so far of each method, over the tasks and seeds that are finished."""
        found = [result for job in self.jobs if job.seed is not None and (result := read_result(job, self.plan.out))]
        means = {spec: [r.accuracy for r in found if r.spec == spec] for spec in self.plan.specs}
        return ", ".join(f"{escape(spec)} {fmean(values):.1%}" for spec, values in means.items() if values)

    def _remaining(self) -> str:
        seconds = remaining_seconds(self.jobs, self.left, self.plan, self.workers)
        if seconds is None:
            return ""
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"about {hours}:{minutes:02}:{rest:02} left"


def remaining_seconds(jobs: Sequence[Job], left: set[Job], plan: Plan, workers: int) -> float | None:
    """How long the jobs that are left will take, from those of the same method and kind that have been measured.

    A method of which nothing has been measured is taken to be like the others; None if nothing has been.
    """
    measured: dict[tuple[str, bool], list[float]] = {}
    for job in jobs:
        result = read_search(job, plan.out) if job.seed is None else read_result(job, plan.out)
        if result is not None:
            measured.setdefault((job.spec, job.seed is None), []).append(result.seconds)
    if not measured:
        return None
    anything = fmean(second for seconds in measured.values() for second in seconds)
    return sum(fmean(measured.get((job.spec, job.seed is None), [anything])) for job in left) / max(
        1, min(workers, len(left))
    )
