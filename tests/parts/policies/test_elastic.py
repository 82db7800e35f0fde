"""Elastic gates: trained towards a rate that every step draws, with a learned response to it."""

import math
import os
import signal

import pytest
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import SpecError
from dyntune.core.losses import rate_loss
from dyntune.model.rates import dispatchers
from dyntune.parts.policies.course import Course
from dyntune.training.interrupt import TrainingInterrupted
from dyntune.training.progress import Silent

ELASTIC = "dyt:rate=0.3/0.9"


def logit(rate):
    return math.log(rate / (1 - rate))


@pytest.fixture
def model(make_host):
    torch.manual_seed(0)
    return dyntune.tune(make_host(), ELASTIC).train()


@pytest.fixture(scope="module")
def data():
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(40) % 5)


def test_one_more_parameter_per_gate_and_only_there(make_host):
    plain, elastic = (dyntune.tune(make_host(), spec) for spec in ("dyt", ELASTIC))
    slopes = {f"{unit.path}.dispatcher.slope" for unit in plain.backbone.units("mlp")}
    assert elastic.tuned_state().keys() - plain.tuned_state().keys() == slopes
    assert all(elastic.tuned_state()[name] == 1 for name in slopes)
    assert dyntune.cost(elastic).trainable_params == dyntune.cost(plain).trainable_params + 3
    assert dyntune.cost(dyntune.tune(make_host(), "dyt:rate=0.6")).macs == dyntune.cost(elastic).macs
    assert elastic.target_rate == pytest.approx(0.6)


def test_every_step_draws_a_rate_that_all_gates_share(model, images_for):
    gates = dispatchers(model.backbone).values()
    assert len({id(gate.course) for gate in gates}) == 1
    drawn = []
    for seed in range(200):
        torch.manual_seed(seed)
        model.backbone.begin_step()
        drawn.append(next(iter(gates)).course.target)
    assert min(drawn) >= 0.3 and max(drawn) <= 0.9
    assert sum(drawn) / 200 == pytest.approx(0.6, abs=0.03)
    assert sum(rate < 0.45 for rate in drawn) == pytest.approx(50, abs=20), "all rates alike"
    torch.manual_seed(7)
    model.backbone.begin_step()
    assert next(iter(gates)).course.target == drawn[7]
    images = images_for(model.backbone.host, 2)
    assert [gate.course.target for gate in model.run(images).gates] == [drawn[7]] * 3
    assert [gate.course.target for gate in model.eval().run(images).gates] == pytest.approx([0.6] * 3)


def test_logits_answer_the_drawn_rate_in_training_only(model, images_for):
    unit = model.backbone.blocks[0].mlp
    gate = unit.dispatcher
    with torch.no_grad():
        gate.slope.fill_(0.7)
    patches = torch.randn(2, 16, unit.width)
    plain = gate.gate(patches).squeeze(-1)
    gate.course.drawn = 0.35
    torch.testing.assert_close(gate.logits(patches), plain + 0.7 * (logit(0.35) - logit(0.6)))
    torch.testing.assert_close(gate.eval().logits(patches), plain)


def test_the_rate_loss_holds_to_the_drawn_rate_and_teaches_the_slope(model, images_for):
    images, labels = images_for(model.backbone.host, 6), torch.arange(6) % 5
    torch.manual_seed(3)
    loss = dyntune.training_loss(model, images, labels)
    target = loss.output.gates[0].course.target
    held = [(gate.logits > 0).float() for gate in loss.output.gates]
    expected = 10.0 * rate_loss(held, target)
    torch.testing.assert_close(loss.terms["rate"], expected)
    assert target != pytest.approx(0.6)
    loss.total.backward()
    slopes = [gate.slope.grad for gate in dispatchers(model.backbone).values()]
    assert all(slope is not None and slope != 0 for slope in slopes)


def test_training_raises_the_activation_with_the_rate(make_host, data):
    """After a few steps the gates open and close with the rate that is asked of them."""
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), f"{ELASTIC},recipe=published,rate_weight=20,complete_weight=0,distill_weight=0")
    dyntune.fit(model, data, epochs=8, batch_size=10, lr=1e-2, device="cpu")
    course = next(iter(dispatchers(model.backbone).values())).course
    model.train()
    shares = []
    for rate in (0.3, 0.6, 0.9):
        course.drawn = rate
        with torch.no_grad():
            gates = [model.run(data.tensors[0]).gates for _ in range(8)]
        shares.append(sum(g.values.mean().item() for gs in gates for g in gs) / 24)
    assert shares[0] < shares[1] < shares[2]
    assert shares == pytest.approx([0.3, 0.6, 0.9], abs=0.12)


class StopAfter(Silent):
    """Interrupts a run after a number of steps, as Ctrl-C does."""

    def __init__(self, steps):
        self.left = steps

    def step(self, figures):
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_draws_the_same_rates_again(make_host, data, tmp_path):
    options = {"epochs": 2, "batch_size": 10, "lr": 1e-2, "device": "cpu"}
    states = []
    for name in ("whole", "stopped"):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), ELASTIC)
        if name == "stopped":
            with pytest.raises(TrainingInterrupted):
                dyntune.fit(model, data, out=tmp_path / name, progress=StopAfter(3), **options)
            torch.manual_seed(0)
            model = dyntune.tune(make_host(), ELASTIC)
        dyntune.fit(model, data, out=tmp_path / name, resume=True, **options)
        states.append(model.tuned_state())
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_save_and_load(model, make_host, images_for, tmp_path):
    with torch.no_grad():
        for number, gate in enumerate(dispatchers(model.backbone).values()):
            gate.slope.fill_(number + 0.5)
    model.eval().save(tmp_path)
    loaded = dyntune.load(tmp_path, backbone=make_host())
    assert loaded.spec == model.spec == ELASTIC
    assert [gate.slope.item() for gate in dispatchers(loaded.backbone).values()] == [0.5, 1.5, 2.5]
    images = images_for(loaded.backbone.host, 2)
    assert torch.equal(loaded(images), model(images))


def test_two_dispatches_draw_each_for_itself(make_host, images_for):
    model = dyntune.tune(make_host(), "linear", "dispatch:where=attn,rate=0.1/0.2", "dispatch:where=mlp,rate=0.7/0.8")
    images = images_for(model.backbone.host, 2)
    dyntune.training_loss(model.train(), images, torch.tensor([0, 1]))
    targets = {gate.unit.rpartition(".")[2]: gate.course.target for gate in model.run(images).gates}
    assert 0.1 < targets["attn"] < 0.2 and 0.7 < targets["mlp"] < 0.8
    assert targets["attn"] != pytest.approx(0.15) and targets["mlp"] != pytest.approx(0.75)


@pytest.mark.parametrize("rate", ["0.9/0.3", "0/0.5", "0.5/1", "0.5/0.5", "0.3/0.5/0.7"])
@pytest.mark.parametrize("part", ["dyt", "dispatch"])
def test_ranges_that_make_no_sense(make_host, part, rate):
    with pytest.raises(SpecError, match=r"lowest and the highest|lower one first"):
        dyntune.tune(make_host(), f"{part}:rate={rate}")


def test_the_middle_holds_before_the_first_step():
    assert Course((0.2, 0.6), (0.1, 0.6), 0.85).target == pytest.approx(0.4)
