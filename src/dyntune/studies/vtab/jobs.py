"""Jobs, run in this process or in workers that survive one another: claimed, and recorded however they end."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from filelock import FileLock, Timeout

from dyntune.core.errors import TrainingError
from dyntune.core.threads import available_cores, chosen_by_user
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.results import FAILURE, finished, read_failure, write_failure
from dyntune.studies.vtab.search import search_job
from dyntune.studies.vtab.train import Report, forget_state, train_job
from dyntune.training.interrupt import TrainingInterrupted

log = logging.getLogger("dyntune")
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
        forget_state(job, plan)
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


class Watcher(Protocol):
    """Told what happens to jobs."""

    def begun(self, job: Job) -> None:
        """A worker has been given the job."""

    def share(self, job: Job, done: float) -> None:
        """How much of the job is done, between 0 and 1."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """The job ended, or another command is at it."""


def run_jobs(jobs: Sequence[Job], plan: Plan, workers: int, watcher: Watcher) -> None:
    """Runs every job once, in this process or in ``workers`` others.

    Raises:
        TrainingInterrupted: Ctrl-C or SIGTERM; every running job has saved its state.
    """
    with _interruptible():
        if workers == 1:
            with _threads(threads_each(1)):
                for job in jobs:
                    watcher.begun(job)
                    watcher.ended(job, run_job(job, plan, lambda done, job=job: watcher.share(job, done)))  # type: ignore[misc]
        elif jobs:
            _Pool(jobs, plan, min(workers, len(jobs)), watcher).run()


def threads_each(workers: int) -> int:
    """Threads per worker: its share of the cores that this process may use, at least one, and no more than torch takes.

    A worker alone has as many as somebody has set, if somebody has.
    """
    if workers == 1 and chosen_by_user():
        return torch.get_num_threads()
    return max(1, min(available_cores() // workers, torch.get_num_threads()))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Worker:
    """A process, and the parent's end of the pipe to it."""

    def __init__(self, plan: Plan, index: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.index = index
        self.job: Job | None = None
        # Not a daemon, which may not have processes that read images; whoever starts it stops it.
        self.process = context.Process(target=_serve, args=(theirs, plan, index, threads))
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe


class _Pool:
    """Keeps workers busy until no job is left."""

    def __init__(self, jobs: Sequence[Job], plan: Plan, workers: int, watcher: Watcher) -> None:
        self.waiting, self.plan, self.watcher = deque(jobs), plan, watcher
        self.threads = threads_each(workers)
        self.size = workers
        self.workers: list[_Worker] = []

    def run(self) -> None:
        try:
            for index in range(self.size):
                self.workers.append(_Worker(self.plan, index, self.threads))
            for worker in self.workers:
                self._hand_out(worker)
            while busy := {w.connection: w for w in self.workers if w.job is not None}:
                for connection in wait(list(busy)):
                    self._listen(busy[connection])  # type: ignore[index]
        finally:
            # Workers that train save their state; a second Ctrl-C, which lands here, does not wait for that.
            for worker in self.workers:
                worker.process.terminate()
            for worker in self.workers:
                worker.process.join()

    def _hand_out(self, worker: _Worker) -> None:
        worker.job = self.waiting.popleft() if self.waiting else None
        if worker.job is not None:
            self.watcher.begun(worker.job)
            with contextlib.suppress(OSError):  # a worker that died is noticed when it is listened to
                worker.connection.send(worker.job)

    def _listen(self, worker: _Worker) -> None:
        job = worker.job
        assert job is not None  # only busy workers are listened to
        try:
            kind, value = worker.connection.recv()
        except (EOFError, OSError):
            self._replace(worker, job)
            return
        if kind == "share":
            self.watcher.share(job, value)
        elif kind == "said":
            level, words = value
            log.log(level, "%s: %s", job, words)
        elif kind == "interrupted":
            raise TrainingInterrupted(value)
        else:
            self.watcher.ended(job, value)
            self._hand_out(worker)

    def _replace(self, worker: _Worker, job: Job) -> None:
        """Records the job of a worker that died, and puts a new one in its place if there is work for it."""
        worker.process.join()
        outcome: Outcome = "done" if finished(job, self.plan.out) else "failed"
        if outcome == "failed":
            code = worker.process.exitcode
            how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit status {code}"
            error = TrainingError(
                f"the worker process ended by {how} during the job. The system ends processes that need too much "
                "memory; use fewer workers and --retry-failed, or smaller batches in another --out."
            )
            write_failure(job.folder(self.plan.out), error)
        self.watcher.ended(job, outcome)
        self.workers.remove(worker)
        if self.waiting:
            fresh = _Worker(self.plan, worker.index, self.threads)
            self.workers.append(fresh)
            self._hand_out(fresh)


class _Said(logging.Handler):
    """Hands on what the library has to say in a worker, so that the parent says it as it says its own."""

    def __init__(self, send: Callable[[str, Any], None]) -> None:
        super().__init__()
        self.send = send

    def emit(self, record: logging.LogRecord) -> None:
        self.send("said", (record.levelno, record.getMessage()))


def _serve(connection: Connection, plan: Plan, index: int, threads: int) -> None:
    """A worker's life: one job after another until the parent stops it or ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then stops its workers in turn
    torch.set_num_threads(threads)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(index % torch.cuda.device_count())

    def send(kind: str, value: Any) -> None:
        with contextlib.suppress(OSError):  # the parent was killed; the job at hand is still worth finishing
            connection.send((kind, value))

    log.addHandler(_Said(send))
    while True:
        try:
            job = connection.recv()
        except (EOFError, OSError):
            return
        try:
            send("ended", run_job(job, plan, lambda done: send("share", done)))
        except TrainingInterrupted as stopped:
            send("interrupted", str(stopped))
            return


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Turns Ctrl-C and SIGTERM outside a running training into TrainingInterrupted as well."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        raise TrainingInterrupted("stopped; what was running has saved its state.") from None
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)
