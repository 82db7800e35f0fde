"""What is said under a table about how its figures came to be."""

from dataclasses import replace
from pathlib import Path

from dyntune.studies.noah import SearchSettings
from dyntune.studies.vtab.recipes import RECIPES
from dyntune.studies.vtab.report import describe


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
