import dataclasses
import math

import pytest

from dyntune.core.errors import TrainingError
from dyntune.training.settings import TrainSettings


def test_learning_rate_warms_up_linearly_and_then_follows_a_cosine():
    settings = TrainSettings(epochs=100, lr=1e-3, min_lr=1e-5, warmup_epochs=10)
    assert settings.learning_rate(0) == 0
    assert settings.learning_rate(2.5) == pytest.approx(0.25e-3)
    assert settings.learning_rate(10) == pytest.approx(1e-3)
    assert settings.learning_rate(55) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 0.5)))
    assert settings.learning_rate(100) == pytest.approx(1e-5)


def test_warmup_is_a_tenth_of_the_epochs_unless_given():
    assert TrainSettings(epochs=50).warmup == 5
    assert TrainSettings(epochs=50, warmup_epochs=0).learning_rate(0) == TrainSettings().lr


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"lr": 0.0}, {"min_lr": 1.0}, {"warmup_epochs": 99}, {"label_smoothing": 1.0}, {"mixup": -1.0}],
)
def test_senseless_options_are_refused(options):
    with pytest.raises(TrainingError, match="expected"):
        TrainSettings(**options)


def test_an_unknown_option_names_the_nearest_one():
    with pytest.raises(TrainingError, match="batch_size"):
        TrainSettings.of(batchsize=3)


def test_only_what_decides_the_weights_counts_as_a_difference():
    before = dataclasses.asdict(TrainSettings())
    assert TrainSettings(workers=3, device="cpu").differences(before) == []
    assert TrainSettings(lr=1e-2).differences(before) == ["lr was 0.001, is 0.01"]
    assert TrainSettings(lr=1e-2).differences(before, ("lr",)) == []
    assert set(before) - set(TrainSettings().deciding()) == {"workers", "device", "log_every", "gradient_checkpointing"}
