"""The presets and how options change them."""

import pytest
import torch

from dyntune.core.errors import TrainingError
from dyntune.studies.vtab.recipes import RECIPES, find_recipe


def test_the_presets_are_the_public_ones_and_pick_no_epoch_on_the_test_images():
    assert list(RECIPES) == ["dyt", "fact", "binary", "noah", "ssf", "vpt"]
    assert all(recipe.settings.select == "last" for recipe in RECIPES.values())
    dyt, fact = RECIPES["dyt"].settings, RECIPES["fact"].settings
    assert (dyt.epochs, dyt.batch_size, dyt.lr, dyt.weight_decay, dyt.min_lr) == (100, 64, 1e-3, 1e-4, 1e-5)
    assert not dyt.drop_last and fact.drop_last
    assert dyt.learning_rate(5) == pytest.approx(5e-4) and fact.learning_rate(11) == pytest.approx(9.758e-4, abs=1e-7)
    assert RECIPES["binary"].normalisation == "none" and RECIPES["vpt"].settings.optimizer == "sgd"
    with pytest.raises(TrainingError, match="Did you mean 'fact'"):
        find_recipe("factt")


def test_other_epochs_scale_the_warm_up_unless_it_is_given():
    recipe = RECIPES["ssf"].changed(epochs=22, lr=None)
    assert recipe.settings.warmup == pytest.approx(2) and recipe.settings.cooldown_epochs == 2
    assert RECIPES["ssf"].changed(epochs=22, warmup_epochs=5).settings.warmup == 5
    changed = RECIPES["fact"].changed(lr=1e-6, drop_path=0.0, normalisation="none")
    assert changed.settings.min_lr == 1e-6 and changed.drop_path == 0 and changed.normalisation == "none"
    assert RECIPES["fact"].changed() == RECIPES["fact"]


@pytest.mark.parametrize("factor", [0.0, -0.1, float("nan"), float("inf")])
def test_the_factor_of_full_tuning_is_above_0(factor):
    with pytest.raises(TrainingError, match=r"full_lr=.*above 0"):
        RECIPES["dyt"].changed(full_lr=factor)


def test_fp16_is_for_gpus():
    assert RECIPES["dyt"].on(torch.device("cpu")).settings.precision == "fp32"
    assert RECIPES["dyt"].on(torch.device("cuda")).settings.precision == "fp16"
    assert RECIPES["fact"].on(torch.device("cpu")) == RECIPES["fact"]


def test_what_changes_speed_alone_is_no_part_of_a_run():
    identity = RECIPES["dyt"].identity()
    assert not {"seed", "device", "workers", "log_every"} & set(identity)
    assert identity["drop_path"] == 0 and identity["schedule"] == "iteration"
