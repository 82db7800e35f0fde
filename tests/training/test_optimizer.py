"""The learning rate of pretrained tensors."""

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import TrainingError
from dyntune.training.optimizer import make_optimizer, pretrained_parameters, set_learning_rate
from dyntune.training.settings import TrainSettings
from dyntune.training.state import RunState
from dyntune.training.trainer import fit


def slow_and_fast(model, **options):
    """Names of the trained tensors by their learning rate at ``lr`` 1."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained, TrainSettings(lr=1.0, **options), pretrained_parameters(model.backbone))
    named = {p: name for name, p in model.tuned_state().items()}
    found = {}
    for group in optimizer.param_groups:
        found.setdefault(group["lr"], set()).update(named[p] for p in group["params"])
    assert sorted(name for names in found.values() for name in names) == sorted(model.tuned_state())
    return found.get(0.01, set()), found.get(1.0, set())


@pytest.mark.parametrize("kind", [{}, {"optimizer": "sgd"}, {"decay_1d": False}])
def test_what_is_pretrained_learns_slowly_and_what_is_new_does_not(make_host, kind):
    model = dyntune.tune(make_host(), "full", "lora", "adaptformer", "dispatch")
    slow, fast = slow_and_fast(model, backbone_lr=0.01, **kind)
    host = dict(make_host().named_parameters())
    assert {name.removeprefix("host.").replace(".base.", ".") for name in slow} == host.keys() - {
        "head.weight",
        "head.bias",
    }
    assert {"host.head.weight", "host.head.bias"} < fast
    assert all("host.head" in n or ".changes." in n or ".parallel." in n or ".dispatcher." in n for n in fast)
    assert slow_and_fast(model, **kind) == (set(), slow | fast)


def test_weight_decay_follows_the_dimensions_in_both_groups(make_host):
    model = dyntune.tune(make_host(), "full", "adaptformer")
    trained = list(model.tuned_state().values())
    settings = TrainSettings(backbone_lr=0.1, decay_1d=False, weight_decay=0.3, lr=0.5)
    optimizer = make_optimizer(trained, settings, pretrained_parameters(model.backbone))
    for group in optimizer.param_groups:
        assert group["params"]
        assert {p.ndim <= 1 for p in group["params"]} == {group["weight_decay"] == 0}
    assert sorted((g["lr"], g["weight_decay"]) for g in optimizer.param_groups) == [
        (0.05, 0.0),
        (0.05, 0.3),
        (0.5, 0.0),
        (0.5, 0.3),
    ]
    set_learning_rate(optimizer, 0.2)
    assert sorted({g["lr"] for g in optimizer.param_groups}) == pytest.approx([0.02, 0.2])


@pytest.mark.parametrize("kind", [{}, {"decay_1d": False}])
def test_a_factor_of_1_leaves_the_groups_of_older_states(make_host, kind):
    model = dyntune.tune(make_host(), "full")
    trained = list(model.tuned_state().values())
    optimizer = make_optimizer(trained, TrainSettings(**kind), pretrained_parameters(model.backbone))
    assert len(optimizer.param_groups) == (2 if kind else 1)
    assert "lr_factor" not in optimizer.state_dict()["param_groups"][0]


@pytest.mark.parametrize("factor", [0, -0.1, 1.5])
def test_a_senseless_factor_is_refused(factor):
    with pytest.raises(TrainingError, match=r"backbone_lr=.*expected above 0 and at most 1"):
        TrainSettings(backbone_lr=factor)


def test_training_and_resuming_keep_the_factor(make_host, tmp_path):
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(20, 3, 32, 32, generator=generator), torch.arange(20) % 5)
    options = {"epochs": 2, "batch_size": 10, "device": "cpu", "lr": 1e-3, "warmup_epochs": 0.0, "weight_decay": 0.0}
    moved = {}
    for factor in (1.0, 1e-3):
        model = dyntune.tune(make_host(), "full")
        before = {name: p.detach().clone() for name, p in model.tuned_state().items()}
        fit(model, data, out=tmp_path / str(factor), backbone_lr=factor, **options)
        moved[factor] = {n: (p - before[n]).abs().max().item() for n, p in model.tuned_state().items()}
    for name, distance in moved[1.0].items():
        share = moved[1e-3][name] / distance
        assert 0.2 < share < 5 if "head" in name else share < 0.01, name
    state = RunState.read(tmp_path / "0.001")
    assert [group.get("lr_factor") for group in state.optimizer["param_groups"]] == [None, 1e-3]
    with pytest.raises(TrainingError, match=r"backbone_lr was 0.001, is 1.0"):
        fit(dyntune.tune(make_host(), "full"), data, out=tmp_path / "0.001", resume=True, **options)
