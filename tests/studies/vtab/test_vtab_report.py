"""What is said under a table about how its figures came to be."""

from dataclasses import replace
from pathlib import Path

import pytest

from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab.recipes import RECIPES
from dyntune.studies.vtab.report import describe, write_tables
from dyntune.studies.vtab.results import JobResult
from dyntune.studies.vtab.tasks import VTAB_1K, open_benchmark


def test_a_preset_as_it_is_needs_no_more_than_its_name(make_plan, tmp_path):
    plan = replace(make_plan(tmp_path), recipe=RECIPES["fact"], weights=Path("some/ViT-B_16.npz"), search=20)
    assert describe(plan) == (
        "Recipe fact; trained on train800val200, last epoch; backbone weights from the file ViT-B_16.npz; learning "
        "rate and any adapter scale searched in 20 trials per method and task on val200."
    )


def test_every_option_that_differs_is_named(make_plan, tmp_path):
    plan = make_plan(tmp_path)
    noah = SearchSettings(population=60)
    recipe = RECIPES["ssf"].changed(lr=0.02, select="val", interpolation="bilinear", noah=noah)
    assert "noah" not in describe(replace(plan, recipe=recipe)), "no method is searched"
    text = describe(replace(plan, recipe=recipe, specs=("linear", "noah")))
    assert text.startswith(
        "Recipe ssf with lr 0.02 (preset 0.001), interpolation bilinear (preset bicubic), noah population 60 "
        "(preset 50); trained on train800, epoch picked on val200 (noah: trained on train800val200, last epoch);"
    )
    assert "weights of vit_mini_patch4_32.dyntune, images of 48 pixels;" in describe(replace(plan, img_size=48))
    own = describe(replace(plan, recipe=replace(RECIPES["ssf"], name="mine")))
    assert "Recipe mine with epochs 110, batch_size 64, drop_last True" in own and "preset" not in own


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_beside_published_results_it_says_what_the_code_of_the_recipe_does(make_plan, tmp_path, recipe):
    plan = replace(make_plan(tmp_path), recipe=recipe.changed(lr=0.3))
    assert "that code" not in describe(plan)
    text = describe(replace(plan, benchmark=VTAB_1K, model="vit_base_patch16_224.augreg_in21k"))
    said = f"follows {recipe.source}; that code starts from {recipe.checkpoint} and reports {recipe.reports}."
    assert text.endswith(f"; no search; the recipe {said}")


def _finish(plan, accuracy):
    plan.take_folder()
    for job in plan.jobs():
        folder = job.folder(plan.out)
        folder.mkdir(parents=True)
        JobResult(job.spec, job.task, job.seed, accuracy, 1.0, 9e7, 100, job.spec, 0.1, 1, 1.0, 1.0).write(folder)


def test_tables_keep_what_earlier_commands_have_trained(make_plan, tmp_path, monkeypatch):
    monkeypatch.setattr("dyntune.studies.pictures.save_figure", lambda figure, path: path)
    whole = open_benchmark(str(make_plan(tmp_path / "other").folders["digits"].parent))[0]
    first = make_plan(tmp_path / "run", ("linear", "lora"), ("digits", "cells"), seeds=(0, 1), whole=whole)
    _finish(first, 0.5)
    write_tables(first)
    second = make_plan(tmp_path / "run", ("ssf",), ("digits",), seeds=(2,), whole=whole)
    _finish(second, 0.75)
    (row,) = write_tables(second)
    assert row.method == "ssf" and row.mean.mean == 0.75
    lines = [line.split(",") for line in (tmp_path / "run" / "table.csv").read_text().splitlines()]
    assert lines[0][:4] == ["method", "seed", "digits", "cells"]
    table = [line[:4] for line in lines[1:] if line[1] != "std"]
    pairs = [[spec, seed, "50.0", "50.0"] for spec in ("linear", "lora") for seed in ("0", "1", "mean")]
    assert table == [["ssf", "2", "75.0", ""], ["ssf", "mean", "75.0", ""], *pairs]
