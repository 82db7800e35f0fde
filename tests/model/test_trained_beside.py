"""What is trained beside the methods is saved with them, and a backbone belongs to one tuned model."""

import copy
import json
import logging
import pickle

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import dyntune
from dyntune.core.digests import checksum
from dyntune.core.errors import BackboneError, CheckpointError, TrainingError
from dyntune.model.adapter_folder import CONFIG, WEIGHTS


@pytest.fixture
def images(make_host, images_for):
    return images_for(make_host(), 4)


def trained(model, images, steps=2):
    """A few steps of a loop of one's own on everything that requires a gradient."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(steps):
        dyntune.training_loss(model, images, torch.arange(len(images)) % 5).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def unfreeze_norms(model):
    for module in model.backbone.host.modules():
        if isinstance(module, nn.LayerNorm):
            module.requires_grad_(True)


def unfreeze_a_block(model):
    model.backbone.host.blocks[1].requires_grad_(True)


def unfreeze_the_position_embedding(model):
    model.backbone.host.pos_embed.requires_grad_(True)


CHANGES = [unfreeze_norms, unfreeze_a_block, unfreeze_the_position_embedding]


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dyt", "lora", "linear"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_unfrozen_is_saved(make_host, images, tmp_path, spec, change):
    model = dyntune.tune(make_host(), spec)
    methods = set(model.tuned_state())
    change(model)
    with torch.enable_grad():
        trained(model, images)
    loaded = dyntune.load(model.save(tmp_path / "first"), backbone=make_host())
    assert torch.equal(loaded(images), model(images))
    assert {n for n, p in loaded.backbone.named_parameters() if p.requires_grad} == set(model.tuned_state()) > methods
    again = dyntune.load(loaded.save(tmp_path / "again"), backbone=make_host())
    assert torch.equal(again(images), model(images))
    assert dyntune.cost(model).trainable_params == dyntune.cost(again).trainable_params


@torch.no_grad()
def test_it_is_saved_after_it_was_frozen_again_and_stays_frozen(make_host, images, tmp_path):
    model = dyntune.tune(make_host(), "lora")
    unfreeze_norms(model)
    with torch.enable_grad():
        trained(model, images)
    model.requires_grad_(False)
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host())
    assert torch.equal(loaded(images), model(images))
    assert not loaded.backbone.host.norm.weight.requires_grad and loaded.backbone.host.head.weight.requires_grad


@torch.no_grad()
def test_frozen_weights_that_were_replaced_are_saved(make_host, images, tmp_path):
    model = dyntune.tune(make_host(), "lora").eval()
    model.backbone.host.load_state_dict(make_host(seed=7).state_dict(), strict=False)
    model.backbone.host.blocks[0].mlp.fc1.weight.mul_(1.01)
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host())
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_one_frozen_value_that_was_changed_is_saved(make_host, images, tmp_path):
    model = dyntune.tune(make_host(), "lora").eval()
    before = model(images)
    model.backbone.host.blocks[0].attn.qkv.weight[17, 5] += 3
    assert len(model.extra_state()) == 1 and not torch.equal(model(images), before)
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host())
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_frozen_values_that_change_places_are_saved(make_host, images, tmp_path, axis):
    """Such as the colours of the first convolution: no value is new."""
    model = dyntune.tune(make_host(), "lora").eval()
    weight = model.backbone.host.patch_embed.proj.weight
    before, asked = model(images), weight.flip(axis)
    weight[:] = asked
    assert len(model.extra_state()) == 1 and not torch.equal(model(images), before)
    loaded = dyntune.load(model.save(tmp_path), backbone=make_host())
    assert torch.equal(loaded(images), model(images))


@torch.no_grad()
def test_frozen_values_are_compared_again_only_where_they_may_have_changed(make_host, tmp_path, monkeypatch):
    looked = []
    monkeypatch.setattr("dyntune.model.state.checksum", lambda tensor: looked.append(tensor) or checksum(tensor))
    model = dyntune.tune(make_host(), "lora")
    weight, every = model.backbone.host.blocks[0].mlp.fc1.weight, len(looked)
    model.state_dict()
    assert len(looked) == every > 0
    model.save(tmp_path / "whole")
    assert len(looked) == 2 * every
    weight.mul_(1)
    assert model.extra_state() == {} and len(looked) == 2 * every + 1
    weight.data[17, 5] += 3
    model.begin_training(2, 0.1)
    model.save(tmp_path / "within")
    assert len(looked) == 2 * every + 1
    model.end_training()
    saved = model.save(tmp_path / "after")
    assert [*json.loads((saved / CONFIG).read_text())["extra"]] == ["host.blocks.0.mlp.fc1.weight"]
    assert "host.blocks.0.mlp.fc1.weight" in model.state_dict() and len(looked) == 3 * every + 1
    model.backbone.host.blocks[1].mlp.fc1.weight = nn.Parameter(torch.zeros_like(weight), requires_grad=False)
    assert len(model.extra_state()) == len(copy.deepcopy(model).extra_state()) == 2


@torch.inference_mode()
def test_in_inference_mode_frozen_values_that_were_changed_are_saved(make_host):
    model = dyntune.tune(make_host(), "lora")
    model.state_dict()
    model.backbone.host.blocks[0].mlp.fc1.weight[17, 5] += 3
    assert "host.blocks.0.mlp.fc1.weight" in model.state_dict()


@torch.no_grad()
def test_statistics_of_a_head_are_saved_and_resumed(make_host, images, tmp_path):
    def make():
        host = make_host()
        host.fc_norm = nn.BatchNorm1d(32, affine=False)  # as in MAE's linear probes
        return host

    data = TensorDataset(images, torch.arange(4) % 5)
    whole, part = dyntune.tune(make(), "linear"), dyntune.tune(make(), "linear")
    with torch.enable_grad():
        dyntune.fit(whole, data, out=tmp_path / "whole", epochs=2, batch_size=4, device="cpu")
    assert float(whole.backbone.host.fc_norm.running_mean.abs().max()) > 0
    loaded = dyntune.load(tmp_path / "whole", backbone=make())
    assert torch.equal(loaded(images), whole(images))
    with torch.enable_grad():
        dyntune.fit(part, data, out=tmp_path / "whole", epochs=2, batch_size=4, device="cpu", resume=True)
    assert torch.equal(part(images), whole(images))


@torch.no_grad()
def test_fit_keeps_and_resumes_what_is_unfrozen(make_host, images, tmp_path):
    model, other = dyntune.tune(make_host(), "lora"), dyntune.tune(make_host(), "lora")
    data = TensorDataset(images, torch.arange(4) % 5)
    for each in (model, other):
        unfreeze_norms(each)
    with torch.enable_grad():
        dyntune.fit(model, data, data, out=tmp_path / "run", epochs=2, batch_size=2, lr=0.01, device="cpu")
        dyntune.fit(other, data, data, out=tmp_path / "run", epochs=2, batch_size=2, lr=0.01, device="cpu", resume=True)
    assert not torch.equal(model.backbone.host.norm.weight, make_host().norm.weight)
    for each in (other, dyntune.load(tmp_path / "run", backbone=make_host())):
        assert torch.equal(each(images), model(images))


def test_the_methods_alone_are_saved_where_nothing_else_was_trained(make_host, images, tmp_path):
    for convert in (lambda model: model, lambda model: model.to(torch.bfloat16)):
        model = convert(trained(dyntune.tune(make_host(), "lora"), images))
        folder = model.save(tmp_path / str(model.backbone.host.norm.weight.dtype))
        assert json.loads((folder / CONFIG).read_text())["extra"] == {}
        assert (folder / WEIGHTS).stat().st_size < 30_000
        loaded = dyntune.load(folder, backbone=make_host())
        given = images.to(next(model.parameters()).dtype)
        with torch.no_grad():
            assert torch.equal(loaded(given), model(given))


def replace_the_head(model):
    model.backbone.host.head = nn.Linear(32, 7)


def add_a_module(model):
    model.auxiliary = nn.Linear(3, 3)


def add_a_layer(model):
    model.backbone.host.norm = nn.Sequential(model.backbone.host.norm, nn.Linear(32, 32))


@pytest.mark.parametrize(
    "change,name", [(replace_the_head, "head.weight"), (add_a_module, "auxiliary.bias"), (add_a_layer, "norm.1.bias")]
)
def test_what_could_not_be_put_on_the_backbone_again_is_refused_before_the_first_step(
    make_host, images, tmp_path, caplog, change, name
):
    model = dyntune.tune(make_host(), "lora")
    change(model)
    before = {key: p.clone() for key, p in model.named_parameters()}
    with pytest.raises(CheckpointError, match=name):
        model.save(tmp_path / "adapter")
    data = TensorDataset(images, torch.arange(4) % 5)
    with pytest.raises(TrainingError, match=name):
        dyntune.fit(model, data, out=tmp_path / "run", epochs=1, device="cpu")
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())
    if change is add_a_module:
        with caplog.at_level(logging.WARNING, "dyntune"):
            dyntune.fit(model, data, epochs=1, device="cpu")
        assert name in caplog.text


def test_weights_that_are_not_finite_are_not_saved(make_host, tmp_path):
    model = dyntune.tune(make_host(), "lora")
    folder = model.save(tmp_path)
    before = (folder / WEIGHTS).read_bytes()
    with torch.no_grad():
        model.backbone.host.head.bias[1] = torch.inf
    with pytest.raises(CheckpointError, match=r"head\.bias: not finite"):
        model.save(tmp_path)
    assert (folder / WEIGHTS).read_bytes() == before


def test_names_for_other_classes_than_the_head_has_are_not_saved(make_host, tmp_path):
    model = dyntune.tune(make_host(), "lora")
    model.classes = ("one", "two")
    with pytest.raises(CheckpointError, match="5 outputs, but classes has 2 names"):
        model.save(tmp_path)


@pytest.mark.parametrize("first", ["linear", "dyt", "lora"])
def test_a_second_model_on_a_backbone_is_refused(make_host, images, tmp_path, first):
    other = dyntune.tune(make_host(), "linear").save(tmp_path)
    host = make_host()
    model = dyntune.tune(host, first).eval()
    answers = model(images)
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for again in (
        lambda: dyntune.load(other, backbone=host),
        lambda: dyntune.tune(host, "linear"),
        lambda: dyntune.tune(copy.copy(host), "linear"),
        lambda: dyntune.tune(copied.backbone.host, "linear"),
        lambda: dyntune.tune(unpickled.backbone.host, "linear"),
    ):
        with pytest.raises(BackboneError):
            again()
    assert torch.equal(model(images), answers)
    shared = make_host()
    shared.patch_embed = host.patch_embed
    with pytest.raises(BackboneError, match="belongs to another tuned model"):
        dyntune.tune(shared, "linear")


def test_a_backbone_is_free_again_when_its_model_is_gone_or_merged(make_host):
    host = make_host()
    dyntune.tune(host, "dyt")
    merged = dyntune.tune(host, "lora").merge()
    assert merged is host
    dyntune.tune(merged, "linear")


def test_a_refused_adapter_leaves_the_backbone_free(make_host, tmp_path):
    folder = dyntune.tune(make_host(), "lora").save(tmp_path)
    host = make_host(seed=5)
    with pytest.raises(CheckpointError, match="other weights"):
        dyntune.load(folder, backbone=host)
    dyntune.load(folder, backbone=host, check_backbone=False)
