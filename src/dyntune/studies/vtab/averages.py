"""Accuracies of tasks to the averages of the published tables: group means, and the mean of group means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from dyntune.studies.vtab.results import JobResult
from dyntune.studies.vtab.tasks import Benchmark


@dataclass(frozen=True)
class Score:
    """A figure over seeds.

    Args:
        mean: over the seeds.
        std: standard deviation over the seeds (n - 1); None for one seed.
    """

    mean: float
    std: float | None


@dataclass(frozen=True)
class SeedRow:
    """A method with one seed; what has not been measured is None.

    Args:
        seed: of all its trainings.
        tasks: accuracy by task folder, between 0 and 1.
        groups: mean accuracy by group.
        mean: mean of the group means.
        params: trained parameters without the head, mean over tasks.
        macs: MACs per image that ran, mean over tasks.
        activation: share of active patches, mean over tasks.
    """

    seed: int
    tasks: dict[str, float | None]
    groups: dict[str, float | None]
    mean: float | None
    params: float | None
    macs: float | None
    activation: float | None


@dataclass(frozen=True)
class MethodRow:
    """A method over its seeds; a figure is None unless every seed has it."""

    method: str
    seeds: tuple[SeedRow, ...]
    tasks: dict[str, Score | None]
    groups: dict[str, Score | None]
    mean: Score | None
    params: float | None
    macs: float | None
    activation: float | None


def group_means(benchmark: Benchmark, accuracy: Mapping[str, float | None]) -> dict[str, float | None]:
    """Mean accuracy of each group; None for a group of which a task is missing."""
    return {
        group: _mean(accuracy.get(task.folder) for task in benchmark.tasks if task.group == group)
        for group in benchmark.groups
    }


def mean_of_groups(groups: Mapping[str, float | None]) -> float | None:
    """What the tables call mean: every group counts alike, however many tasks it has; None if a group is missing."""
    return _mean(groups.values())


def method_row(benchmark: Benchmark, method: str, seeds: Sequence[int], results: Iterable[JobResult]) -> MethodRow:
    """All figures of a method.

    Args:
        benchmark: with the tasks that are averaged.
        method: the spec.
        seeds: those that the averages are over.
        results: of any methods; others are ignored.
    """
    own = {(r.seed, r.task): r for r in results if r.spec == method}
    rows = tuple(_seed_row(benchmark, seed, {task: r for (s, task), r in own.items() if s == seed}) for seed in seeds)
    return MethodRow(
        method=method,
        seeds=rows,
        tasks={task.folder: _score(row.tasks[task.folder] for row in rows) for task in benchmark.tasks},
        groups={group: _score(row.groups[group] for row in rows) for group in benchmark.groups},
        mean=_score(row.mean for row in rows),
        params=_mean(row.params for row in rows),
        macs=_mean(row.macs for row in rows),
        activation=_mean(row.activation for row in rows),
    )


def _seed_row(benchmark: Benchmark, seed: int, results: Mapping[str, JobResult]) -> SeedRow:
    found = [results.get(task.folder) for task in benchmark.tasks]
    tasks = {t.folder: None if r is None else r.accuracy for t, r in zip(benchmark.tasks, found, strict=True)}
    groups = group_means(benchmark, tasks)
    return SeedRow(
        seed=seed,
        tasks=tasks,
        groups=groups,
        mean=mean_of_groups(groups),
        params=_mean(None if r is None else r.trainable_params for r in found),
        macs=_mean(None if r is None else r.macs for r in found),
        activation=_mean(None if r is None else r.activation for r in found),
    )


def _mean(values: Iterable[float | None]) -> float | None:
    given = list(values)
    known = [value for value in given if value is not None]
    return fmean(known) if known and len(known) == len(given) else None


def _score(values: Iterable[float | None]) -> Score | None:
    given = list(values)
    known = [value for value in given if value is not None]
    if not known or len(known) < len(given):
        return None
    return Score(fmean(known), stdev(known) if len(known) > 1 else None)
