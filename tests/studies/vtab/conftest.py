"""A miniature benchmark on disk, and plans for it that a job finishes in about a second."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.data.drawn.vtab_mini import write_vtab_mini
from dyntune.studies.vtab.folders import find_folders
from dyntune.studies.vtab.plan import Plan
from dyntune.studies.vtab.recipes import RECIPES
from dyntune.studies.vtab.tasks import open_benchmark


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six tasks with 16 + 8 training and 12 test images each; not to be changed."""
    return write_vtab_mini(tmp_path_factory.mktemp("mini"), test_images=12, train_images=16, val_images=8)


@pytest.fixture(scope="session")
def make_plan(mini_root: Path) -> Callable[..., Plan]:
    """``make_plan(out, specs, tasks, root=mini_root, options={}, **fields)``; recipe ``dyt`` in two short epochs."""

    def make(out, specs=("linear",), tasks=("digits", "cells"), root=mini_root, options=None, **fields):
        benchmark, folder = open_benchmark(str(root))
        benchmark = benchmark.choose(tasks)
        recipe = RECIPES["dyt"].changed(**{"epochs": 2, "batch_size": 8, "precision": "fp32"} | (options or {}))
        recipe = replace(recipe, settings=replace(recipe.settings, device="cpu"))
        seeds = fields.pop("seeds", (0,))
        folders = find_folders(benchmark, folder)
        weights = fields.pop("weights", None)
        return Plan(out, benchmark, folders, BUILTIN_BACKBONE, weights, recipe, tuple(specs), seeds, **fields)

    return make
