"""The sentence that says under a table what its figures were trained with."""

from __future__ import annotations

from typing import Any

from dyntune.studies.vtab.plan import Plan
from dyntune.studies.vtab.recipes import RECIPES, Recipe

_SELECT = {
    "last": "trained on train800val200, last epoch",
    "val": "trained on train800, epoch picked on val200",
    "test": "trained on train800val200, epoch picked on the test images that it is reported on",
}


def describe(plan: Plan) -> str:
    """Recipe and what differs from it, the images that train and pick the epoch, backbone weights, and search."""
    weights = f"from the file {plan.weights.name}" if plan.weights else f"of {plan.model}"
    search = f"learning rate and any adapter scale searched in {plan.search} trials per method and task on val200"
    pieces = [
        f"Recipe {plan.recipe.name}{_differences(plan.recipe)}",
        _SELECT[plan.recipe.settings.select],
        f"backbone weights {weights}",
        search if plan.search else "no search",
    ]
    return f"{'; '.join(pieces)}."


def _differences(recipe: Recipe) -> str:
    """The options that are not the preset's; all of them for a recipe that is no preset."""
    preset = _options(RECIPES[recipe.name]) if recipe.name in RECIPES else {}
    changed = [
        f"{name} {_text(value)}" + (f" (preset {_text(preset[name])})" if name in preset else "")
        for name, value in _options(recipe).items()
        if name not in preset or preset[name] != value
    ]
    return f" with {', '.join(changed)}" if changed else ""


def _options(recipe: Recipe) -> dict[str, Any]:
    options = recipe.identity()
    noah = {f"noah {name}": value for name, value in options.pop("noah").items()}
    del options["select"]  # said in words of its own
    return {**options, **noah}


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
