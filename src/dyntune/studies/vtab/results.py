"""The records of a job: its result or its failure, each a file that is there only when it is complete."""

from __future__ import annotations

import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

from dyntune.core.errors import TrainingError
from dyntune.core.files import SEAL, load_json, seal_holds, sealed, write_json, write_text
from dyntune.studies.vtab.plan import Job

Record = TypeVar("Record")
RESULT, FAILURE, TRACEBACK = "result.json", "failed.json", "traceback.txt"


@dataclass(frozen=True)
class JobResult:
    """A finished training.

    Args:
        spec: the method as the user wrote it.
        task: the task's folder name.
        seed: of the training.
        accuracy: top-1 on the test split, between 0 and 1.
        activation: mean share of active patches on the test split.
        macs: MACs per image that ran on the test split, without the head.
        trainable_params: trained parameters without the head.
        trained_spec: the method as it was trained; other than ``spec`` after a search.
        lr: peak learning rate.
        epoch: the epoch that was kept, counted from 1.
        train_seconds: time that training took, interruptions left out.
        seconds: the same with evaluation.
        activation_per_unit: share of active patches on the test split by gated unit.
    """

    spec: str
    task: str
    seed: int
    accuracy: float
    activation: float
    macs: float
    trainable_params: int
    trained_spec: str
    lr: float
    epoch: int
    train_seconds: float
    seconds: float
    activation_per_unit: dict[str, float] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Marks the job in ``folder`` as finished."""
        write_json(folder / RESULT, sealed(asdict(self)))


@dataclass(frozen=True)
class SearchResult:
    """A finished search.

    Args:
        lr: the best peak learning rate.
        scale: the best adapter scale; None if the method has none.
        accuracy: the best trial's on ``val200``, between 0 and 1.
        trials: how many there were.
        seconds: time that this process spent on it.
    """

    lr: float
    scale: float | None
    accuracy: float
    trials: int
    seconds: float

    def write(self, folder: Path) -> None:
        """Marks the search in ``folder`` as finished."""
        write_json(folder / RESULT, sealed(asdict(self)))


@dataclass(frozen=True)
class Failure:
    """Why a job did not finish.

    Args:
        kind: name of the error's class.
        error: its message.
    """

    kind: str
    error: str

    def write(self, folder: Path) -> None:
        """Marks the job in ``folder`` as failed."""
        write_json(folder / FAILURE, asdict(self))


def write_failure(folder: Path, error: BaseException) -> None:
    """Records an error and its traceback."""
    write_text(folder / TRACEBACK, "".join(traceback.format_exception(error)))
    Failure(type(error).__name__, str(error)).write(folder)


def read_result(job: Job, out: Path) -> JobResult | None:
    """The result of a training, None if it has not finished."""
    return _read(job.folder(out) / RESULT, JobResult)


def read_search(job: Job, out: Path) -> SearchResult | None:
    """The result of the search that a training builds on, or of a search itself; None if it has not finished."""
    return _read(Job(job.spec, job.task, None).folder(out) / RESULT, SearchResult)


def read_failure(job: Job, out: Path) -> Failure | None:
    """Why a job failed, None if it has not."""
    return _read(job.folder(out) / FAILURE, Failure)


def finished(job: Job, out: Path) -> bool:
    """Whether a job need not be run again."""
    return (job.folder(out) / RESULT).exists()


def _read(file: Path, kind: type[Record]) -> Record | None:
    try:
        values = load_json(file)
        if not seal_holds(values):
            raise ValueError("digests differ")
        values.pop(SEAL, None)
        return kind(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise TrainingError(f"{file} is damaged ({error}). Remove it, and the job is run again.") from error
