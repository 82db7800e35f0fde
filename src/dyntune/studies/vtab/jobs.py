"""Running one job: claimed so that nobody else does, and recorded whether it finishes or fails."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from filelock import FileLock, Timeout

from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.results import FAILURE, finished, read_failure, write_failure
from dyntune.studies.vtab.search import search_job
from dyntune.studies.vtab.train import Report, train_job
from dyntune.training.interrupt import TrainingInterrupted

LOCK = "claim.lock"
Outcome = Literal["done", "failed", "taken"]
"""How a job ended here; ``taken`` means that another process is at it."""


def run_job(job: Job, plan: Plan, report: Report) -> Outcome:
    """Runs a job unless another process does; whatever goes wrong in it is recorded in its folder.

    The operating system releases a claim when its process ends in any way, so none is ever left behind.

    Args:
        job: a training or a search.
        plan: what it belongs to.
        report: is told the share that is done.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM; the state is saved.
    """
    folder = job.folder(plan.out)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        claim = FileLock(folder / LOCK).acquire(timeout=0)
    except Timeout:
        return "taken"
    with claim:
        if finished(job, plan.out):
            return "done"
        if read_failure(job, plan.out):
            return "failed"
        try:
            work = search_job if job.seed is None else train_job
            work(job, plan, report).write(folder)
        except TrainingInterrupted:
            raise
        except Exception as error:  # one job's failure must leave the others alone
            write_failure(folder, error)
            return "failed"
        return "done"


def forget_failure(job: Job, out: Path) -> None:
    """Has a failed job run again, from where it was; from the beginning if it was its saved state that failed."""
    folder = job.folder(out)
    failure = read_failure(job, out)
    if failure is None:
        return
    if failure.kind == "CheckpointError":
        shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / FAILURE).unlink(missing_ok=True)
