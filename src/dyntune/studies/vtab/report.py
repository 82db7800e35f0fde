"""The tables and the picture that a benchmark leaves in its folder, and what they say its figures were trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dyntune.core.files import write_text
from dyntune.core.machine import machine
from dyntune.studies import pictures
from dyntune.studies.vtab.plan import Job, Plan
from dyntune.studies.vtab.published import comparable, published_rows
from dyntune.studies.vtab.recipes import RECIPES, Recipe
from dyntune.studies.vtab.results import read_result
from dyntune.studies.vtab.table import MethodRow, method_row, to_csv, to_latex, to_markdown

FIGURE = "accuracy_over_macs"
_SELECT = {
    "last": "trained on train800val200, last epoch",
    "val": "trained on train800, epoch picked on val200",
    "test": "trained on train800val200, epoch picked on the test images that it is reported on",
}
_NOAH = " (noah: trained on train800val200, last epoch)"


def summarise(plan: Plan, seeds: Mapping[str, Sequence[int]]) -> list[MethodRow]:
    """A row per method of the plan, from the results in its folder, over its ``seeds``."""
    rows = []
    for spec in plan.specs:
        jobs = (Job(spec, task.folder, seed) for seed in seeds[spec] for task in plan.benchmark.tasks)
        results = [result for job in jobs if (result := read_result(job, plan.out))]
        rows.append(method_row(plan.benchmark, spec, seeds[spec], results))
    return rows


def write_tables(asked: Plan) -> list[MethodRow]:
    """Writes ``table.csv``, ``.md`` and ``.tex``, and the figure once a method has finished.

    They are of all that the folder holds, so that a command which adds methods, tasks or seeds takes nothing away.

    Returns:
        The rows of the plan itself.
    """
    plan = asked.with_earlier()
    rows = summarise(plan, {spec: asked.seeds_of(spec) for spec in plan.specs})
    write_text(plan.out / "table.csv", to_csv(rows, plan.benchmark))
    trained, measured = describe(plan), f"Measured on {machine()}."
    markdown = to_markdown(rows, plan.benchmark, plan.model, f"{trained} {measured}", published=is_published(plan))
    write_text(plan.out / "table.md", markdown)
    write_text(plan.out / "table.tex", to_latex(rows, plan.benchmark, f"{plan.benchmark.name}: {trained} {measured}"))
    points = [pictures.Point(r.method, r.macs, r.mean.mean, r.mean.std) for r in rows if r.mean and r.macs]
    if points:
        figure = pictures.accuracy_macs_figure(points, _published(plan))
        for suffix in ("png", "svg"):
            pictures.save_figure(figure, plan.out / f"{FIGURE}.{suffix}")
    return summarise(asked, dict.fromkeys(asked.specs, asked.seeds))


def _published(plan: Plan) -> list[pictures.Point]:
    """The published results, where they can be compared."""
    if not is_published(plan):
        return []
    return [pictures.Point(row.name, row.gflops * 1e9, row.mean / 100) for row in published_rows()]


def is_published(plan: Plan) -> bool:
    """Whether there are published results to compare with those of a plan."""
    return comparable(plan.benchmark, plan.model, plan.img_size)


def describe(plan: Plan) -> str:
    """Recipe and what differs from it, the images that train and pick the epoch, backbone weights, and search.

    Beside published results it also says what the recipe's own code does, which explains part of any difference.
    """
    kind = "folder" if plan.weights and plan.weights.is_dir() else "file"
    weights = f"from the {kind} {plan.weights.name}" if plan.weights else f"of {plan.model}"
    search = f"learning rate and any adapter scale searched in {plan.search} trials per method and task on val200"
    select = plan.recipe.settings.select
    pieces = [
        f"Recipe {plan.recipe.name}{_differences(plan.recipe, plan.uses_noah)}",
        _SELECT[select] + (_NOAH if plan.uses_noah and select != "last" else ""),
        f"backbone weights {weights}" + (f", images of {plan.img_size} pixels" if plan.img_size else ""),
        search if plan.search else "no search",
    ]
    if is_published(plan):
        recipe = plan.recipe
        pieces.append(f"the recipe follows {recipe.source}")
        pieces.append(f"that code starts from {recipe.checkpoint} and reports {recipe.reports}")
    return f"{'; '.join(pieces)}."


def _differences(recipe: Recipe, noah: bool) -> str:
    """The options that are not the preset's; all of them for a recipe that is no preset.

    Args:
        noah: whether the sizes of noah's search are among the options.
    """
    preset = _options(RECIPES[recipe.name], noah) if recipe.name in RECIPES else {}
    changed = [
        f"{name} {_text(value)}" + (f" (preset {_text(preset[name])})" if name in preset else "")
        for name, value in _options(recipe, noah).items()
        if name not in preset or preset[name] != value
    ]
    return f" with {', '.join(changed)}" if changed else ""


def _options(recipe: Recipe, noah: bool) -> dict[str, Any]:
    options = recipe.identity()
    sizes = {f"noah {name}": value for name, value in options.pop("noah").items()}
    del options["select"]  # said in words of its own
    return {**options, **sizes} if noah else options


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
