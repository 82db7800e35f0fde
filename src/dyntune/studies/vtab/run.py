"""A benchmark from its plan to its tables: what is not finished is run and shown, whatever fails is named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from dyntune.core.errors import BackboneError, SpecError, TrainingError
from dyntune.core.words import counted, duration
from dyntune.model.tuned import TunedModel
from dyntune.studies.vtab.folders import load_task
from dyntune.studies.vtab.jobs import Outcome, forget_failure, run_jobs, threads_each
from dyntune.studies.vtab.plan import Job, Plan, unsearched
from dyntune.studies.vtab.report import write_tables
from dyntune.studies.vtab.results import Failure, finished, read_failure, read_result, read_search
from dyntune.studies.vtab.search import open_storage
from dyntune.studies.vtab.table import MethodRow
from dyntune.training.header import Header, backbone_row, device_row, method_rows, outlines, too_small
from dyntune.training.interrupt import TrainingInterrupted


@dataclass(frozen=True)
class BenchmarkResult:
    """What a benchmark came to.

    Args:
        rows: a row per method, as in the tables.
        failures: the jobs that failed, now or earlier, and why.
        elsewhere: the jobs that are neither finished nor failed, because another command is at them.
    """

    rows: list[MethodRow]
    failures: dict[Job, Failure]
    elsewhere: list[Job]


def check_methods(plan: Plan) -> list[TunedModel]:
    """Builds every method on the shape of the backbone, so that what cannot work is known before anything is trained.

    Returns:
        The models, as shapes alone.

    Raises:
        BackboneError: the backbone or its weight file does not exist, or a method is not defined on it.
        SpecError: a method is configured wrongly.
        TrainingError: the recipe drops partial batches, and a batch is larger than what is trained on.
    """
    _check_batches(plan)
    if plan.weights is not None and not plan.weights.exists():
        raise BackboneError(
            f"no weight file at {plan.weights}. Expected a .npz, .pth or .safetensors file, or a folder for hf: models."
        )
    for spec in plan.specs:
        if plan.search and unsearched(spec):
            raise SpecError(
                f"{spec} searches its own sizes, which --search cannot be part of; run it without --search."
            )
    parts = [[spec] for spec in plan.specs]
    return outlines(plan.model, parts, classes=("yes", "no"), weights=plan.weights, **plan.backbone_arguments)


def benchmark_header(plan: Plan, models: Sequence[TunedModel], workers: int = 1) -> Header:
    """What is said before the first job.

    Args:
        plan: the benchmark.
        models: of each method, as shapes alone.
        workers: jobs at a time.
    """
    benchmark, settings = plan.benchmark, plan.recipe.settings
    sizes = sorted({task.classes for task in benchmark.tasks})
    classes = f"{sizes[0]} to {counted(sizes[-1], 'class')}" if len(sizes) > 1 else counted(sizes[0], "class")
    images = f"{benchmark.train_images} training and {benchmark.val_images} validation images each"
    seeds, epochs = counted(len(plan.seeds), "seed"), counted(settings.epochs, "epoch")
    trials = f", after {counted(plan.search, 'trial')} of each method and task" if plan.search else ""
    together = "" if workers == 1 else f", {counted(workers, 'job')} at a time"
    return Header(
        (
            backbone_row(models[0]),
            ("data", f"{benchmark.name}: {counted(len(benchmark.tasks), 'task')} of {classes}, {images}"),
            *method_rows(models),
            device_row(settings, counted(threads_each(1), "thread")),
            ("training", f"{counted(len(plan.jobs()), 'job')} of {epochs} ({seeds}){trials}{together}"),
        ),
        tuple(_too_small(plan, models[0])),
    )


def _too_small(plan: Plan, model: TunedModel) -> Iterator[str]:
    """What is said of the first task whose images the backbone is too small for."""
    for task in plan.benchmark.tasks:
        warnings = list(too_small(model, load_task(task, plan.folders[task.folder], "train800").train))
        if warnings:
            yield from (f"{task.title}: {warning}" for warning in warnings)
            return


def run_benchmark(
    plan: Plan, *, workers: int = 1, retry_failed: bool = False, console: Console | None = None
) -> BenchmarkResult:
    """Runs the searches and then the trainings that are not finished yet, and writes the tables.

    Args:
        plan: the benchmark, with its data checked.
        workers: jobs at a time; with more than one, each has a process of its own.
        retry_failed: whether jobs that failed earlier are run again.
        console: where progress is shown; standard error by default.

    Raises:
        TrainingError: the folder holds another run.
        TrainingInterrupted: Ctrl-C or SIGTERM; states are saved and tables written.
    """
    models = check_methods(plan)
    plan.take_folder()
    if plan.search:
        open_storage(plan)  # makes the tables, which workers must not do at the same time
    every = [*plan.searches(), *plan.jobs()]
    if retry_failed:
        for job in every:
            forget_failure(job, plan.out)
    console = console or Console(stderr=True)
    console.print(f"{benchmark_header(plan, models, workers)}\n", markup=False, highlight=False, soft_wrap=True)
    try:
        for phase in (plan.searches(), plan.jobs()):
            todo = [job for job in phase if _open(job, plan)]
            with JobDisplay(plan, phase, todo, workers, console) as display:
                run_jobs(todo, plan, workers, display)
    except TrainingInterrupted:
        done = sum(finished(job, plan.out) for job in every)
        write_tables(plan)
        raise TrainingInterrupted(
            f"stopped: {done} of {counted(len(every), 'job')} finished, and those that were running have saved their "
            f"state in {plan.out}."
        ) from None
    failures = {job: failure for job in every if (failure := read_failure(job, plan.out))}
    elsewhere = [job for job in every if _waits(job, plan, failures)]
    return BenchmarkResult(write_tables(plan), failures, elsewhere)


def _check_batches(plan: Plan) -> None:
    settings, benchmark = plan.recipe.settings, plan.benchmark
    halves = settings.select == "val" or plan.search or any(map(unsearched, plan.specs))
    images = benchmark.train_images + (0 if halves else benchmark.val_images)
    if settings.drop_last and images < settings.batch_size:
        raise TrainingError(
            f"batches of {settings.batch_size} of which the recipe {plan.recipe.name} drops the last partial one: "
            f"{images} training images leave none. Give a --batch-size of at most {images}, or a --recipe that keeps "
            "the last batch."
        )


def failure_report(failures: dict[Job, Failure], plan: Plan) -> str:
    """The failed jobs, their errors, and what to do."""
    lines = [f"{job}: {failure.kind}: {failure.error} ({job.folder(plan.out)})" for job, failure in failures.items()]
    jobs = counted(len(lines), "job")
    advice = "run again with --retry-failed once the cause is gone, or with other options in another --out"
    return f"{jobs} failed; {advice}:\n  " + "\n  ".join(lines)


def job_states(plan: Plan, jobs: Sequence[Job]) -> list[tuple[Job, str]]:
    """Each job with "finished", "failed" or "to do"."""

    def state(job: Job) -> str:
        return "finished" if finished(job, plan.out) else "failed" if read_failure(job, plan.out) else "to do"

    return [(job, state(job)) for job in jobs]


def _open(job: Job, plan: Plan) -> bool:
    """Whether a job can be run now: not finished, not failed, and its search is there."""
    searched = job.seed is None or not plan.search or read_search(job, plan.out) is not None
    return searched and not finished(job, plan.out) and read_failure(job, plan.out) is None


def _waits(job: Job, plan: Plan, failures: dict[Job, Failure]) -> bool:
    """Whether a job is open although it has been tried, and not for want of a search that failed."""
    blocked = job.seed is not None and plan.search and Job(job.spec, job.task, None) in failures
    return not blocked and job not in failures and not finished(job, plan.out)


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
        self.first: dict[Job, tuple[float, float]] = {}
        self.estimated = False
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
        now = time.monotonic()
        share, began = self.first.setdefault(job, (done, now))
        if done == share or self.estimated or self._remaining():
            return
        self.estimated = True
        each = (now - began) / (done - share)
        left = each * len(self.left) / max(1, min(self.workers, len(self.left)))
        said = f"about {duration(left)} for {counted(len(self.left), 'job')}, if all are like {job}"
        self.console.print(said, markup=False, highlight=False, soft_wrap=True)

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
