"""The files that a benchmark leaves in its folder, from what is finished so far."""

from __future__ import annotations

from dyntune.core.files import write_text
from dyntune.core.machine import machine
from dyntune.studies.pictures.accuracy_macs import Point, accuracy_macs_figure
from dyntune.studies.pictures.save import save_figure
from dyntune.studies.vtab.averages import MethodRow, method_row
from dyntune.studies.vtab.describe import describe
from dyntune.studies.vtab.plan import Plan
from dyntune.studies.vtab.published import comparable, published_rows
from dyntune.studies.vtab.results import read_result
from dyntune.studies.vtab.table import to_csv, to_latex, to_markdown

FIGURE = "accuracy_over_macs"


def summarise(plan: Plan) -> list[MethodRow]:
    """A row per method of the plan, from the results in its folder."""
    results = [result for job in plan.jobs() if (result := read_result(job, plan.out))]
    return [method_row(plan.benchmark, spec, plan.seeds, results) for spec in plan.specs]


def write_tables(plan: Plan) -> list[MethodRow]:
    """Writes ``table.csv``, ``.md`` and ``.tex``, and the figure once a method has finished; gives the rows back."""
    rows = summarise(plan)
    write_text(plan.out / "table.csv", to_csv(rows, plan.benchmark))
    trained, measured = describe(plan), f"Measured on {machine()}."
    write_text(plan.out / "table.md", to_markdown(rows, plan.benchmark, plan.model, f"{trained} {measured}"))
    write_text(plan.out / "table.tex", to_latex(rows, plan.benchmark, f"{plan.benchmark.name}: {trained} {measured}"))
    points = [Point(r.method, r.macs, r.mean.mean, r.mean.std) for r in rows if r.mean and r.macs]
    if points:
        figure = accuracy_macs_figure(points, _published(plan))
        for suffix in ("png", "svg"):
            save_figure(figure, plan.out / f"{FIGURE}.{suffix}")
    return rows


def _published(plan: Plan) -> list[Point]:
    """The published results, where they can be compared."""
    if not comparable(plan.benchmark, plan.model):
        return []
    return [Point(row.name, row.gflops * 1e9, row.mean / 100) for row in published_rows()]
