"""The models that take part in a measurement, and gates set to a rate on given images."""

import pytest
import torch

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.studies.bench.peers import candidates, fresh, set_gates, untouched


@pytest.fixture
def model(make_host, randomise):
    return randomise(dyntune.tune(make_host(), "lora:rank=2", "dyt"), seed=2).eval()


@torch.no_grad()
def test_the_dense_peer_is_the_backbone_without_what_was_put_on_it(model, images_for):
    images = images_for(model.backbone.host, 2)
    before = model(images)
    host = untouched(model).eval()
    names = {name.replace(".base.", ".") for name, _ in model.backbone.host.named_parameters() if "changes" not in name}
    assert {name for name, _ in host.named_parameters()} == names
    torch.testing.assert_close(host.head.weight, model.backbone.host.head.weight)
    for own, block in zip(host.blocks, model.backbone.blocks, strict=True):
        qkv = model.backbone.host.blocks[block.index].attn.qkv
        assert torch.equal(own.attn.qkv.weight, qkv.base.weight)
        for parameter in qkv.changes.parameters():
            parameter.zero_()
        block.mlp.parallel["adapter"].up_proj.weight.zero_()
        block.mlp.parallel["adapter"].up_proj.bias.zero_()
    torch.testing.assert_close(host(images), model.run(images, complete=True).logits)
    assert not torch.allclose(before, host(images), atol=1e-3)


@torch.no_grad()
def test_peers_have_the_same_backbone_and_head(model, images_for):
    images = images_for(model.backbone.host, 2)
    found = candidates("ours", model, ["dense", "tome:r=2", "adaptformer", "gather"], trained=True)
    assert [candidate.name for candidate in found] == ["ours", "dense", "tome:r=2", "adaptformer", "gather"]
    assert [candidate.gated for candidate in found] == [True, False, False, False, True]
    assert [candidate.trained for candidate in found] == [True, False, False, False, True]
    ours, dense, tome, adapted, gather = found
    assert torch.equal(dense.eager(images), dense.model.backbone.host(images)), "timed as it is, so it refuses nothing"
    torch.testing.assert_close(dense.eager(images), dense.model(images))
    alone = dyntune.tune(untouched(model), "tome:r=2").eval()
    torch.testing.assert_close(tome.eager(images), alone(images))
    assert [reduction.count for reduction in tome.model.run(images).reductions] == [15, 13, 11]
    assert not torch.allclose(adapted.eager(images), dense.eager(images)), "an adapter of zeros would hide errors"
    assert gather.model is model
    assert torch.equal(gather.eager(images), ours.eager(images))


def test_a_fresh_model_has_no_tensor_of_zeros_that_multiplies_tokens():
    model = fresh("vit_mini_patch4_32.dyntune", ["dyt", "lora"], classes=7, weights=None, pretrained=False)
    assert model.backbone.classes == 7
    assert all(tensor.any() for tensor in model.tuned_state().values() if tensor.ndim > 1)
    with pytest.raises(BackboneError, match="no model"):
        fresh("vit_of_nobody", ["dyt"], classes=7, weights=None, pretrained=False)


def test_a_model_is_not_compared_with_itself(make_host):
    with pytest.raises(SpecError, match="must differ"):
        candidates("dyt:rate=0.5", dyntune.tune(make_host(), "dyt"), ["dense", "dyt"], trained=False)


@pytest.mark.parametrize("where", ["mlp", "attn", "attn-mlp", "layer"])
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_every_gate_lets_exactly_the_share_through(make_host, randomise, images_for, where, rate):
    host = make_host()
    images = images_for(host, 4)
    model = randomise(dyntune.tune(host, "adaptformer", f"dispatch:where={where}"), seed=1)
    before = [gate.values.mean().item() for gate in model.eval().run(images).gates]
    set_gates(model, images, rate)
    gates = model.run(images).gates
    assert [gate.values.mean().item() for gate in gates] == [rate] * len(gates)
    assert before != [rate] * len(gates)


def test_a_share_of_patches_is_rounded_to_whole_ones(make_host, images_for):
    host = make_host()
    model, images = dyntune.tune(host, "dyt:rate=0.3"), images_for(host, 1)
    set_gates(model, images)
    assert [gate.values.sum().item() for gate in model.run(images).gates] == [5.0] * 3  # of 16, for 0.3


def test_gates_are_trained_on_afterwards(make_host, images_for):
    host = make_host()
    model, images = dyntune.tune(host, "dyt"), images_for(host, 2)
    set_gates(model, images)
    biases = [p for name, p in model.named_parameters() if name.endswith("dispatcher.gate.bias")]
    assert len(biases) == 3 and all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in biases)
    assert not model.training


def test_a_gate_without_a_bias_is_set_by_its_threshold(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "dyt"))
    for unit in model.backbone.units("mlp"):
        unit.dispatcher.gate.bias = None
    images = images_for(model.backbone.host, 2)
    set_gates(model, images, 0.25)
    assert [gate.values.mean().item() for gate in model.run(images).gates] == [0.25] * 3
