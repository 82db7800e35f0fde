"""The averages of the published tables, and the table for people, papers and programs; a dash is not measured."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from dyntune.core.texts import for_csv, for_markdown, for_markdown_code, printable
from dyntune.studies.vtab.published import SOURCE, published_row
from dyntune.studies.vtab.results import JobResult
from dyntune.studies.vtab.tasks import Benchmark

DASH = "-"
_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_TEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}


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


def columns(benchmark: Benchmark) -> list[str]:
    """Heads of the columns after method and seed."""
    return [task.title for task in benchmark.tasks] + [*benchmark.groups, "Mean", "Params (M)", "MACs (G)"]


def cells(row: MethodRow | SeedRow, benchmark: Benchmark) -> list[str]:
    """The figures of a row under ``columns``: accuracies in per cent, tasks with one decimal and means with two."""
    accuracies = [_percent(row.tasks[task.folder], 1) for task in benchmark.tasks]
    accuracies += [_percent(row.groups[group], 2) for group in benchmark.groups]
    return [*accuracies, _percent(row.mean, 2), _scaled(row.params, 1e6), _scaled(row.macs, 1e9)]


def terminal_rows(
    rows: Sequence[MethodRow], benchmark: Benchmark, *, published: bool
) -> tuple[list[str], list[list[str]]]:
    """Heads and rows with the methods side by side, because 19 tasks do not fit across a terminal.

    Args:
        rows: of the methods.
        benchmark: what they were run on.
        published: whether the published results can be compared.
    """
    figures = [cells(row, benchmark) for row in rows]
    lines = [[name, *(own[i] for own in figures)] for i, name in enumerate(columns(benchmark))]
    if published:
        theirs = [published_row(row.method) for row in rows]
        lines.append(["Mean, published", *(DASH if p is None else f"{p.mean:.2f}" for p in theirs)])
    return ["", *(row.method for row in rows)], lines


def to_csv(rows: Sequence[MethodRow], benchmark: Benchmark) -> str:
    """One line per method and seed, and the mean and the standard deviation over seeds; empty where not measured.

    Accuracies are per cent, parameters and MACs are counts per image.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = [*(task.folder for task in benchmark.tasks), *(group.lower() for group in benchmark.groups), "mean"]
    writer.writerow(["method", "seed", *names, "params", "macs", "activation"])
    for row in rows:
        for seed in row.seeds:
            values = [*seed.tasks.values(), *seed.groups.values(), seed.mean]
            _write(writer, row.method, str(seed.seed), values, (seed.params, seed.macs, seed.activation))
        scores = [*row.tasks.values(), *row.groups.values(), row.mean]
        means = [None if score is None else score.mean for score in scores]
        _write(writer, row.method, "mean", means, (row.params, row.macs, row.activation))
        if len(row.seeds) > 1:
            deviations = [None if score is None else score.std for score in scores]
            _write(writer, row.method, "std", deviations, (None, None, None))
    return file.getvalue()


def to_markdown(rows: Sequence[MethodRow], benchmark: Benchmark, model: str, measured: str, *, published: bool) -> str:
    """The table with a line per seed under each method, and how its figures were trained and measured.

    Args:
        rows: of the methods.
        benchmark: what they were run on.
        model: timm name of the backbone.
        measured: how and on what.
        published: whether the published results can be compared.
    """
    heads = ["method", "seed", *columns(benchmark)]
    lines = [
        f"# {for_markdown(benchmark.name)} with {for_markdown(model)}",
        "",
        "| " + " | ".join(heads) + " |",
        "| --- | --- |" + " ---: |" * (len(heads) - 2),
    ]
    for row in rows:
        for name, own in _blocks(row):
            lines.append("| " + " | ".join([for_markdown_code(row.method), name, *cells(own, benchmark)]) + " |")
    lines += ["", f"{_legend(rows)} {measured}", ""]
    known = [(row, published_row(row.method)) for row in rows] if published else []
    if any(theirs for _, theirs in known):
        lines += [f"Published ({SOURCE}):", "", "| method | name there | Mean | Params (M) | MACs (G) |"]
        lines += ["| --- | --- | ---: | ---: | ---: |"]
        lines += [
            f"| {for_markdown_code(row.method)} | {p.name} | {p.mean:.2f} | {p.params_m:.2f} | {p.gflops:.2f} |"
            for row, p in known
            if p
        ]
        lines.append("")
    return "\n".join(lines)


def to_latex(rows: Sequence[MethodRow], benchmark: Benchmark, measured: str) -> str:
    """The table for the packages booktabs and graphicx: a line per method, tasks under their groups.

    How its figures were trained and measured is a comment in the first line.
    """
    sizes = [sum(task.group == group for task in benchmark.tasks) for group in benchmark.groups]
    starts = [2 + sum(sizes[:i]) for i in range(len(sizes))]
    heads = [f"\\rotatebox{{90}}{{{_escape(name)}}}" for name in columns(benchmark)]
    lines = [
        f"% {' '.join(measured.split())}",
        f"\\begin{{tabular}}{{l{'c' * len(heads)}}}",
        "\\toprule",
        " & "
        + " & ".join(f"\\multicolumn{{{n}}}{{c}}{{{_escape(g)}}}" for n, g in zip(sizes, benchmark.groups, strict=True))
        + f" & \\multicolumn{{{len(sizes) + 3}}}{{c}}{{}} \\\\",
        " ".join(f"\\cmidrule(lr){{{s}-{s + n - 1}}}" for s, n in zip(starts, sizes, strict=True)),
        " & " + " & ".join(heads) + " \\\\",
        "\\midrule",
    ]
    for row in rows:
        figures = [cell.replace(" ± ", " $\\pm$ ").replace(DASH, "--") for cell in cells(row, benchmark)]
        lines.append(f"\\texttt{{{_escape(row.method)}}} & " + " & ".join(figures) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def _blocks(row: MethodRow) -> list[tuple[str, MethodRow | SeedRow]]:
    seeds: list[tuple[str, MethodRow | SeedRow]] = [(str(seed.seed), seed) for seed in row.seeds]
    return [*seeds, ("mean", row)] if len(seeds) > 1 else seeds


def _legend(rows: Sequence[MethodRow]) -> str:
    spread = " ± is the standard deviation over seeds." if any(len(row.seeds) > 1 for row in rows) else ""
    return (
        "Top-1 accuracy on the test split in per cent. Mean is the mean of the group means. Parameters are those "
        "trained, without the head; MACs per image are those that ran on the test images, without the head, mean over "
        f"tasks.{spread}"
    )


def _percent(value: Score | float | None, digits: int) -> str:
    if value is None:
        return DASH
    if isinstance(value, Score):
        spread = "" if value.std is None else f" ± {100 * value.std:.{digits}f}"
        return f"{100 * value.mean:.{digits}f}{spread}"
    return f"{100 * value:.{digits}f}"


def _scaled(value: float | None, unit: float) -> str:
    return DASH if value is None else f"{value / unit:.3f}"


def _escape(text: str) -> str:
    return "".join(_TEX.get(sign, sign) for sign in printable(text))


def _write(
    writer: object, method: str, seed: str, shares: Sequence[float | None], counts: Sequence[float | None]
) -> None:
    accuracies = ["" if share is None else round(100 * share, 4) for share in shares]
    writer.writerow([for_csv(method), seed, *accuracies, *("" if count is None else count for count in counts)])  # type: ignore[attr-defined]
