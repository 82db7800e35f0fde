"""Surrogates: what stands in for a unit at the patches that skip it."""

import copy
import dataclasses
import json

import pytest
import safetensors.torch
import torch
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.errors import SpecError
from dyntune.core.files import SEAL
from dyntune.model import objective
from dyntune.model.adapter_folder import CONFIG, WEIGHTS
from dyntune.model.executions import Compact, Masked, Sampled
from dyntune.model.rates import dispatchers
from dyntune.model.worth import fit_units
from dyntune.parts.policies.surrogate import Surrogate
from dyntune.training import trainer
from dyntune.training.progress import Silent

VARIANTS = ("mlp", "attn", "attn-mlp", "layer")


@pytest.fixture(scope="module")
def data():
    images = torch.randn(20, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return TensorDataset(images, torch.arange(20) % 5)


def gated(model):
    return [unit for unit in model.backbone.all_units() if unit.dispatcher is not None]


def begun(model, images):
    """The model after the first step's loss of a training whose length is known."""
    model.train().begin_training(10, 1e-3)
    dyntune.training_loss(model, images, torch.arange(len(images)) % 5, step=0)
    return model


def unexplained(surrogate, x, updates):
    """The share of the updates' squares that the surrogate misses."""
    skipped = torch.ones(x.shape[:-1])
    return ((surrogate(x, skipped) - updates).square().sum() / updates.square().sum()).item()


def test_a_map_of_its_rank_is_found():
    torch.manual_seed(0)
    x = torch.randn(8, 50, 24) * torch.linspace(0.5, 2, 24) + 3
    updates = x @ torch.randn(24, 3) @ torch.randn(3, 24) + torch.randn(24)
    surrogate = Surrogate(24, 3)
    assert unexplained(surrogate, x, updates) == 1, "before, it adds nothing"
    surrogate.fit(x, updates)
    assert unexplained(surrogate, x, updates) < 0.02
    hidden = x.flatten(0, 1) @ surrogate.down.float().T + surrogate.shift.float()
    torch.testing.assert_close(hidden.mean(0), torch.zeros(3), atol=0.1, rtol=0)
    torch.testing.assert_close(hidden.std(0), torch.ones(3), atol=0.05, rtol=0)
    narrower = Surrogate(24, 1)
    narrower.fit(x, updates)
    assert 0.03 < unexplained(narrower, x, updates) < 1
    assert not surrogate(x, torch.zeros(8, 50)).any(), "tokens that go through the unit get nothing of it"


def test_what_cannot_be_predicted_leaves_the_mean():
    x, updates = torch.ones(4, 9, 8), torch.randn(4, 9, 8, generator=torch.Generator().manual_seed(0))
    surrogate = Surrogate(8, 2)
    surrogate.fit(x, updates)
    torch.testing.assert_close(surrogate(x, torch.ones(4, 9))[0, 0], updates.mean((0, 1)), atol=1e-2, rtol=0)
    assert all(bool(buffer.isfinite().all()) for buffer in surrogate.buffers())


def test_its_mean_is_exact_in_spite_of_what_bf16_rounds():
    torch.manual_seed(0)
    x = torch.randn(40, 64) * 0.1 + 5 * torch.randn(64)  # much of a stream is what all tokens have in common
    updates = x @ torch.randn(64, 64)
    surrogate = Surrogate(64, 8)
    surrogate.fit(x, updates)
    made = surrogate(x, torch.ones(40)).mean(0)
    torch.testing.assert_close(made, updates.mean(0), atol=5e-3 * updates.mean(0).abs().max().item(), rtol=0)


def test_autocast_does_not_round_the_regression():
    torch.manual_seed(0)
    x, updates = 30 * torch.randn(512, 16), torch.randn(512, 16)
    one, other = Surrogate(16, 4), Surrogate(16, 4)
    one.fit(x, updates)
    with torch.autocast("cpu", torch.bfloat16):
        other.fit(x, updates)
    assert all(torch.equal(a, b) for a, b in zip(one.buffers(), other.buffers(), strict=True))


def test_a_model_that_was_trained_without_them_goes_on_without_them(make_host, images_for):
    """Its adapters make up already for what skipped patches lack."""
    model = dyntune.tune(make_host(), "dyt")
    with torch.no_grad():
        for gate in dispatchers(model.backbone).values():
            gate.gate.bias.add_(0.1)
    begun(model, images_for(model.backbone.host, 4))
    assert not any(bool(buffer.any()) for unit in gated(model) for buffer in unit.surrogate.buffers())


def test_features_that_are_not_finite_are_left_to_the_training():
    surrogate = Surrogate(8, 2)
    surrogate.begin_course(None)
    assert surrogate.unfitted
    surrogate.fit(torch.full((4, 8), float("nan")), torch.ones(4, 8))
    assert not surrogate.unfitted and not any(bool(buffer.any()) for buffer in surrogate.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_step_of_a_training_fits_them(make_host, images_for, variant):
    """Nothing else of the model changes; later steps leave them as they are."""
    torch.manual_seed(0)
    model = dyntune.tune(make_host(), f"dyt:dispatch={variant},surrogate=0.25")
    before = {name: tensor.clone() for name, tensor in model.tuned_state().items() if "dispatcher" not in name}
    images = images_for(model.backbone.host, 8)
    twin = copy.deepcopy(model)
    begun(model, images)
    for unit in gated(model):
        assert unit.surrogate.down.shape == (8, 32)
        assert all(bool(buffer.any()) for buffer in unit.surrogate.buffers())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.tuned_state().items() if name in before)
    fitted = [buffer.clone() for unit in gated(model) for buffer in unit.surrogate.buffers()]
    dyntune.training_loss(model, images.flip(0) * 2, torch.arange(8) % 5, step=1)
    assert all(
        torch.equal(one, other)
        for one, other in zip(fitted, (b for u in gated(model) for b in u.surrogate.buffers()), strict=True)
    )
    twin.train()
    dyntune.training_loss(twin, images, torch.arange(8) % 5)  # nobody has told the length
    assert not any(bool(buffer.any()) for unit in gated(twin) for buffer in unit.surrogate.buffers())


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_skipping_costs_less_of_the_features(make_host, images_for, variant):
    model = dyntune.tune(make_host(), f"dispatch:where={variant},surrogate=0.5,lead=none,spread=none")
    images = images_for(model.backbone.host, 16)
    begun(model, images).eval().end_training()
    whole = model.run(images, complete=True).tokens.patches
    for gate in dispatchers(model.backbone).values():
        gate.gate.weight.zero_()
        gate.gate.bias.fill_(-1)
    lost = (model.run(images).tokens.patches - whole).norm()
    for unit in gated(model):
        unit.surrogate = None
    assert lost < 0.8 * (model.run(images).tokens.patches - whole).norm()


@torch.no_grad()
def test_what_is_wanted_leads_back_to_the_whole_model(make_host, images_for):
    """With it added, whatever skipping has left in front of a unit, patches are those of the whole model."""
    model = dyntune.tune(make_host(), "dispatch:where=layer,surrogate=0.25").eval()
    images, behind, wanted = images_for(model.backbone.host, 4), [], []
    model.run(images, complete=True, watch=lambda tokens: behind.append(tokens.patches))
    fit_units(model.backbone, gated(model), 0.5, lambda unit, x, lacking: wanted.append((x, lacking)), images)
    assert len(wanted) == len(behind) - 1 == 3
    for (x, lacking), before, after in zip(wanted, behind, behind[1:], strict=False):
        torch.testing.assert_close(x + lacking, after, atol=1e-5, rtol=1e-4)
        assert torch.equal(x, before) == (before is behind[0]), "patches have skipped the blocks in front"


@torch.no_grad()
def test_each_makes_up_for_what_those_in_front_of_it_leave(make_host, images_for):
    """Closer to the whole model's features than maps that are each fitted to their own unit's update."""

    class Random(Compact):
        def __init__(self):
            self.random = torch.Generator().manual_seed(1)

        def gated(self, unit, tokens, policy):
            gate = policy.gate(unit, tokens)
            values = (torch.rand(gate.values.shape, generator=self.random) < 0.2).to(gate.values.dtype)
            gate = dataclasses.replace(gate, values=values)
            return tokens.with_x(self.computed(unit, tokens, gate)), gate

    class Alone(Masked):
        def gated(self, unit, tokens, policy):
            update = unit.update(tokens)
            policy.fit(unit, tokens.patches, update[:, tokens.prefix :])
            return tokens.with_x(tokens.x + update), policy.gate(unit, tokens)

    model = dyntune.tune(make_host(), "dispatch:surrogate=0.25").eval()
    images, others = images_for(model.backbone.host, 32), images_for(model.backbone.host, 16, seed=1)
    whole = model.run(others, complete=True).tokens.x
    model.run(images, execution=Alone())
    alone = (model.run(others, execution=Random()).tokens.x - whole).norm()
    policy = model.policies[0]
    fit_units(model.backbone, gated(model), 0.2, policy.fit, images)
    assert (model.run(others, execution=Random()).tokens.x - whole).norm() < 0.96 * alone


def test_a_gate_learns_what_its_unit_is_worth_beyond_the_surrogate(make_host, randomise, images_for):
    """The gradient of a gate is that of going through the unit instead of the surrogate; exploring expects the same."""
    for explore in ("none", "1"):
        model = randomise(dyntune.tune(make_host(), f"dispatch:explore={explore},surrogate=0.25"), seed=2).train()
        unit, policy = model.backbone.blocks[0].mlp, model.policies[0]
        tokens = model.backbone.embed(images_for(model.backbone.host, 2))
        with torch.no_grad():
            difference = unit.update(tokens) - unit.surrogate(tokens.x, torch.ones(tokens.x.shape[:2]))
        own = model.run(images_for(model.backbone.host, 2)).gates[0]
        assert 0 < own.values.mean() < 1
        execution = Masked() if explore == "none" else Sampled()
        out, gate = execution.gated(unit, tokens, policy)
        (gradient,) = torch.autograd.grad(out.x.sum(), gate.values)
        torch.testing.assert_close(gradient, difference.sum(-1)[:, tokens.prefix :], atol=1e-4, rtol=1e-4)


def test_they_are_saved_in_bf16_and_loaded(make_host, images_for, tmp_path):
    model = dyntune.tune(make_host(), "dyt:surrogate=0.25")
    images = images_for(model.backbone.host, 8)
    begun(model, images).end_training()
    with torch.no_grad():
        for gate in dispatchers(model.backbone).values():
            gate.gate.bias.fill_(0)
            gate.gate.weight.sub_(gate.gate.weight.mean())
    model.eval().save(tmp_path)
    kept = {n: t for n, t in safetensors.torch.load_file(tmp_path / WEIGHTS).items() if "surrogate" in n}
    assert len(kept) == 3 * 4 and {tensor.dtype for tensor in kept.values()} == {torch.bfloat16}
    loaded = dyntune.load(tmp_path, backbone=make_host())
    assert 0 < loaded.run(images).gates[0].values.mean() < 1
    assert torch.equal(loaded(images), model(images))
    halved = copy.deepcopy(model).half().float()  # which keeps them as they are
    assert all(torch.equal(one, other) for one, other in zip(halved.buffers(), model.buffers(), strict=True))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_fit_shows_them_more_than_small_batches_hold(make_host, data, monkeypatch, checkpointing):
    """The images of the first four batches, as augmented as these are."""

    class Augmented(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + torch.rand(()), label

    looked, shown = [], []

    def noted(backbone, units, share, fit, images):
        looked.append((share, images))
        fit_units(backbone, units, share, fit, images)

    monkeypatch.setattr(objective, "fit_units", noted)
    model = dyntune.tune(make_host(), "dyt:rate=0.3,complete_during=0/0")
    run = model.run
    monkeypatch.setattr(model, "run", lambda images, **options: shown.append(images) or run(images, **options))
    options = {"gradient_checkpointing": checkpointing, "device": "cpu", "calibrate": False}
    dyntune.fit(model, Augmented(*data.tensors), epochs=1, batch_size=4, **options)
    ((share, images),) = looked
    assert share == 0.3
    assert torch.equal(images, torch.cat(shown[:4]))


def test_a_method_without_gates_reads_no_image_before_the_first_step(make_host, data, monkeypatch):
    def fails(*_):
        raise AssertionError("nobody wants to look")

    monkeypatch.setattr(trainer._Run, "_first_images", fails)
    dyntune.fit(dyntune.tune(make_host(), "adaptformer"), data, epochs=1, batch_size=20, device="cpu")


def test_an_interrupted_run_keeps_those_that_it_has(make_host, data, tmp_path):
    class Stop(Silent):
        def step(self, figures):
            self.count = getattr(self, "count", 0) + 1
            if self.count == 3:
                raise KeyboardInterrupt

    def run(out, **options):
        torch.manual_seed(0)
        model = dyntune.tune(make_host(), "dyt:surrogate=0.25")
        dyntune.fit(model, data, out=out, epochs=2, batch_size=4, device="cpu", lr=1e-2, calibrate=False, **options)
        return model.state_dict()

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped", progress=Stop())
    parts = run(tmp_path / "stopped", resume=True)
    assert any("surrogate" in name and bool(tensor.any()) for name, tensor in whole.items())
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items() if torch.is_tensor(tensor))


def test_they_cost_two_small_products_per_patch(make_host):
    plain, with_them = (dyntune.cost(dyntune.tune(make_host(), f"dyt:surrogate={share}")) for share in ("none", "0.25"))
    assert with_them.trainable_params == plain.trainable_params
    assert with_them.macs - plain.macs == 3 * 17 * 2 * 32 * 8
    assert with_them.adapter_bytes - plain.adapter_bytes == 3 * 2 * (2 * 32 * 8 + 8 + 32)
    assert dyntune.cost(dyntune.tune(make_host(), "dyt:recipe=published")).macs == plain.macs


def test_the_rank_is_at_least_one(make_host):
    model = dyntune.tune(make_host(), "dyt:surrogate=0.001")
    assert model.backbone.blocks[0].mlp.surrogate.down.shape == (1, 32)
    for wrong in ("0", "1.5", "-1"):
        with pytest.raises(SpecError, match="surrogate above 0 and at most 1, or none"):
            dyntune.tune(make_host(), f"dyt:surrogate={wrong}")


@torch.no_grad()
def test_folders_from_before_have_none(make_host, images_for, tmp_path):
    model = dyntune.tune(make_host(), "dyt:surrogate=none").eval()
    model.save(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text(encoding="utf-8"))
    del config[SEAL], config["parts"][1]["surrogate"], config["parts"][1]["feature_weight"]
    config["spec"] = "dyt"
    (tmp_path / CONFIG).write_text(json.dumps(config), encoding="utf-8")
    loaded = dyntune.load(tmp_path, backbone=make_host())
    assert loaded.backbone.blocks[0].mlp.surrogate is None and "surrogate=none" in loaded.spec
    assert "feature_weight=0," in loaded.spec
    images = images_for(model.backbone.host, 2)
    assert torch.equal(loaded(images), model(images))
