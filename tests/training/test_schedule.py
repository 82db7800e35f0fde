"""The learning rates of public code, and the options of a run that they come with."""

import math
from dataclasses import asdict

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import TrainingError
from dyntune.data.transforms import Preprocessing
from dyntune.training.inputs import with_pixels_as
from dyntune.training.optimizer import make_optimizer
from dyntune.training.randomness import EpochSampler
from dyntune.training.settings import TrainSettings
from dyntune.training.trainer import fit

TIMM = {"epochs": 100, "lr": 1e-3, "min_lr": 1e-5, "warmup_epochs": 10, "warmup_lr": 1e-6}


def _timm_rates(last: int, lag: int) -> list[float]:
    """What an optimiser has in each epoch when timm's scheduler is stepped at the end of every epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = CosineLRScheduler(optimizer, t_initial=100, lr_min=1e-5, warmup_t=10, warmup_lr_init=1e-6)
    rates = []
    for epoch in range(last):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(epoch + 1 - lag)
    return rates


@pytest.mark.parametrize(("form", "lag"), [("timm", 0), ("timm-lagged", 1)])
def test_timm_schedules_are_those_of_timm(form, lag):
    settings = TrainSettings(schedule=form, **TIMM)
    ours = [settings.learning_rate(epoch + 0.7) for epoch in range(100)]
    assert ours == pytest.approx(_timm_rates(100, lag))


def test_timm_begins_its_cosine_with_the_warm_up():
    settings = TrainSettings(schedule="timm", **TIMM)
    assert settings.learning_rate(10) == pytest.approx(9.758e-4, abs=1e-7)
    lagged = TrainSettings(schedule="timm-lagged", **TIMM)
    assert lagged.learning_rate(0) == lagged.learning_rate(1) == 1e-6
    assert lagged.learning_rate(11) == settings.learning_rate(10)


def test_a_schedule_by_epoch_is_constant_within_one():
    by_step = TrainSettings(epochs=100, warmup_epochs=10, min_lr=0.0)
    by_epoch = TrainSettings(epochs=100, warmup_epochs=10, min_lr=0.0, schedule="epoch")
    assert by_epoch.learning_rate(55.9) == by_step.learning_rate(55.0) == pytest.approx(0.5e-3)
    assert by_epoch.learning_rate(0.9) == 0


FORMS = ("iteration", "epoch", "timm", "timm-lagged")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (1, 7), (2, 1), (2, 5), (3, 3), (9, 1)])
def test_no_step_of_a_short_run_is_wasted_on_its_warm_up(form, epochs, steps):
    settings = TrainSettings(epochs=epochs, schedule=form)
    places = [epoch + step / steps for epoch in range(epochs) for step in range(steps)]
    rates = [settings.learning_rate(place, steps) for place in places]
    wasted = epochs * steps >= 10 and form == "iteration"  # its warm-up is a step or more, and begins at 0
    assert min(rates[wasted:]) > 0 and max(rates) == pytest.approx(1e-3, rel=0.1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [1, 4])
def test_the_warm_up_ends_within_the_run(form, steps):
    """Even one that is asked to last as long as the run; up to its end it rises as asked."""
    settings = TrainSettings(epochs=4, warmup_epochs=4, schedule=form)
    rates = [settings.learning_rate(epoch + step / steps, steps) for epoch in range(4) for step in range(steps)]
    assert rates[:-steps] == sorted(rates[:-steps]) and rates[0] == 0
    expected = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * 0.75))
    expected = {"timm": expected, "timm-lagged": 1e-5 + (1e-3 - 1e-5) * 0.5}.get(form, 1e-3)
    assert rates[-1] == pytest.approx(expected)


def test_a_run_of_one_step_trains(make_host):
    data = TensorDataset(torch.randn(3, 3, 32, 32), torch.arange(3))
    model = dyntune.tune(make_host(), "linear")
    before = model.backbone.host.head.weight.clone()
    assert fit(model, data, epochs=1, device="cpu").steps == 1
    assert not torch.equal(model.backbone.host.head.weight, before)


def test_the_cooldown_stays_at_the_lowest_rate():
    settings = TrainSettings(schedule="timm", **TIMM | {"epochs": 110}, cooldown_epochs=10)
    assert settings.learning_rate(50) == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi / 2)))
    assert settings.learning_rate(100) == settings.learning_rate(109) == pytest.approx(1e-5)


def test_options_that_an_older_state_lacks_were_at_their_defaults():
    before = asdict(TrainSettings())
    for name in ("optimizer", "drop_last", "schedule", "eval_every"):
        del before[name]
    assert TrainSettings().differences(before) == []
    assert TrainSettings(optimizer="sgd").differences(before) == ["optimizer was adamw, is sgd"]


@pytest.mark.parametrize("options", [{"warmup_lr": 1.0}, {"cooldown_epochs": 30}, {"eval_every": 0}])
def test_senseless_schedules_are_refused(options):
    with pytest.raises(TrainingError, match="expected"):
        TrainSettings(**options)


def test_tensors_of_one_dimension_need_not_decay():
    layer = nn.Linear(3, 2)
    layer.weight.grad, layer.bias.grad = torch.zeros(2, 3), torch.zeros(2)
    nn.init.ones_(layer.weight)
    nn.init.ones_(layer.bias)
    make_optimizer(list(layer.parameters()), TrainSettings(lr=0.5, weight_decay=0.1, decay_1d=False)).step()
    assert torch.allclose(layer.weight, torch.full((2, 3), 0.95)) and torch.equal(layer.bias, torch.ones(2))
    assert isinstance(make_optimizer(list(layer.parameters()), TrainSettings(optimizer="sgd")), torch.optim.SGD)


@pytest.mark.parametrize(("drop", "count"), [(False, 24), (True, 16)])
def test_processes_get_batches_of_one_size_each(drop, count):
    """20 images for two processes with batches of 4: filled up from the beginning, or cut."""
    sampler = EpochSampler(20, 3, 8, drop=drop)
    order = list(sampler)
    assert len(order) == len(sampler) == count and len({*order}) == min(count, 20)
    assert order[20:] == order[: max(count - 20, 0)]
    sampler.skip = 8
    assert [*sampler] == order[8:]


def test_drop_last_and_eval_every_change_steps_and_choice(make_host):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(10, 3, 32, 32, generator=generator), torch.arange(10) % 5)
    model = dyntune.tune(make_host(), "linear")
    options = {"epochs": 5, "batch_size": 4, "device": "cpu", "eval_every": 2}
    result = fit(model, data, data, drop_last=True, **options)
    assert result.steps == 10 and result.best_epoch in (2, 4, 5)
    assert fit(dyntune.tune(make_host(), "linear"), data, data, **options).steps == 15
    with pytest.raises(TrainingError, match="drop_last leaves no step"):
        fit(model, data, drop_last=True, batch_size=11, device="cpu")


def test_preprocessing_takes_other_statistics():
    own = Preprocessing((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic")
    assert with_pixels_as(own, "backbone", "backbone") == own
    none = with_pixels_as(own, "none", "bilinear")
    assert none.mean == (0, 0, 0) and none.std == (1, 1, 1) and none.interpolation == "bilinear"
    assert with_pixels_as(own, "imagenet", "backbone").mean == (0.485, 0.456, 0.406)
