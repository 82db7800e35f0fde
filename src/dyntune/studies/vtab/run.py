"""A benchmark from its plan to its tables: everything that is not finished is run, whatever fails is named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from rich.console import Console

from dyntune.backbones.source import create_backbone
from dyntune.core.errors import BackboneError, SpecError, TrainingError
from dyntune.model.tuned import tune
from dyntune.studies.vtab.averages import MethodRow
from dyntune.studies.vtab.display import JobDisplay
from dyntune.studies.vtab.jobs import forget_failure
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.pool import run_jobs
from dyntune.studies.vtab.report import write_tables
from dyntune.studies.vtab.results import Failure, finished, read_failure, read_search
from dyntune.studies.vtab.search import open_storage
from dyntune.studies.vtab.train import unsearched
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


def check_methods(plan: Plan) -> None:
    """Builds every method on the shape of the backbone, so that what cannot work is known before anything is trained.

    Raises:
        BackboneError: the backbone or its weight file does not exist, or a method is not defined on it.
        SpecError: a method is configured wrongly.
        TrainingError: the recipe drops partial batches, and a batch is larger than what is trained on.
    """
    _check_batches(plan)
    if plan.weights is not None and not plan.weights.is_file():
        raise BackboneError(f"no weight file at {plan.weights}. Expected a .npz, .pth or .safetensors file.")
    for spec in plan.specs:
        if plan.search and unsearched(spec):
            raise SpecError(
                f"{spec} searches its own sizes, which --search cannot be part of; run it without --search."
            )
        with torch.device("meta"):
            tune(create_backbone(plan.model, pretrained=False, num_classes=2), spec)


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
    check_methods(plan)
    plan.take_folder()
    if plan.search:
        open_storage(plan)  # makes the tables, which workers must not do at the same time
    every = [*plan.searches(), *plan.jobs()]
    if retry_failed:
        for job in every:
            forget_failure(job, plan.out)
    try:
        for phase in (plan.searches(), plan.jobs()):
            todo = [job for job in phase if _open(job, plan)]
            with JobDisplay(plan, phase, todo, workers, console) as display:
                run_jobs(todo, plan, workers, display)
    except TrainingInterrupted:
        done = sum(finished(job, plan.out) for job in every)
        write_tables(plan)
        raise TrainingInterrupted(
            f"stopped: {done} of {len(every)} jobs are finished, and those that were running have saved their state in "
            f"{plan.out}. The same command goes on from there."
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
    jobs = "1 job" if len(lines) == 1 else f"{len(lines)} jobs"
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
