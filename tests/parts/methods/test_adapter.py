"""Adapter against straight-line code, the published counts and the names of the public code."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.adapter import Adapter, Bottleneck

DENSE_VIT_B = 17_581_972_224
PLACES = ("mlp", "attn", "attn-mlp")


def vit_base():
    with shapes_only():
        return timm.create_model("vit_base_patch16_224", num_classes=100)


@torch.no_grad()
def filled(model, seed=1):
    """The model with random values in everything that is tuned."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.tuned_state().items()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def adapted(adapter, update, activation):
    hidden = update @ adapter.down_proj.weight.T + adapter.down_proj.bias
    hidden = {"quick_gelu": hidden * torch.sigmoid(1.702 * hidden), "gelu": F.gelu(hidden), "relu": hidden.clamp(min=0)}
    return update + hidden[activation] @ adapter.up_proj.weight.T + adapter.up_proj.bias


def straight_line(model, images, activation="quick_gelu"):
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        update = block.ls1(block.attn(block.norm1(x)))
        x = x + (adapted(unit.attn.sequential["adapter"], update, activation) if unit.attn.sequential else update)
        update = block.ls2(block.mlp(block.norm2(x)))
        x = x + (adapted(unit.mlp.sequential["adapter"], update, activation) if unit.mlp.sequential else update)
    return host.forward_head(host.norm(x))


@pytest.mark.parametrize(
    "options,parameters,macs",
    [
        ("", 156_768, 17_611_021_056),
        (":where=attn-mlp", 313_536, DENSE_VIT_B + 2 * 29_048_832),
        (":bottleneck=64", 1_189_632, DENSE_VIT_B + 8 * 29_048_832),
    ],
)
def test_published_counts(options, parameters, macs):
    cost = dyntune.cost(dyntune.tune(vit_base(), f"adapter{options}"))
    assert (cost.trainable_params, cost.macs, cost.dense_macs) == (parameters, macs, DENSE_VIT_B)


@pytest.mark.parametrize("where,places", [("mlp", 3), ("attn", 3), ("attn-mlp", 6)])
@pytest.mark.parametrize("name,tokens", [("plain", 17), ("siglip", 16), ("oblong", 16)])
def test_closed_form_counts(make_host, name, tokens, where, places):
    cost = dyntune.cost(dyntune.tune(make_host(name), f"adapter:where={where},bottleneck=5"))
    assert cost.trainable_params == places * (2 * 32 * 5 + 5 + 32)
    assert cost.macs - cost.dense_macs == places * tokens * 2 * 32 * 5


@pytest.mark.parametrize("where", PLACES)
@torch.no_grad()
def test_logits_equal_straight_line_code(make_host, images_for, host_name, where):
    host = make_host(host_name)
    images = images_for(host, 3)
    bare = host.forward_features(images)
    model = filled(dyntune.tune(host, f"adapter:where={where}"))
    for execution in ("masked", "compact"):
        logits = model.run(images, execution=execution).logits
        torch.testing.assert_close(logits, straight_line(model, images), atol=1e-5, rtol=1e-5)
    assert (model(images) - host.forward_head(bare)).abs().max() > 1e-3


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "relu"])
@torch.no_grad()
def test_activations(make_host, images_for, activation):
    model = filled(dyntune.tune(make_host(), f"adapter:activation={activation}"))
    images = images_for(model.backbone.host, 2)
    expected = {name: straight_line(model, images, name) for name in ("quick_gelu", "gelu", "relu")}
    torch.testing.assert_close(model(images), expected.pop(activation), atol=1e-5, rtol=1e-5)
    assert all((model(images) - other).abs().max() > 1e-4 for other in expected.values())


@torch.no_grad()
def test_starts_as_the_identity(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "adapter:where=attn-mlp").eval()
    assert torch.equal(model(images), expected)
    for unit in model.backbone.units("attn-mlp"):
        adapter = unit.sequential["adapter"]
        zeros = (adapter.down_proj.bias, adapter.up_proj.weight, adapter.up_proj.bias)
        assert all(zero.abs().max() == 0 for zero in zeros)
        bound = math.sqrt(6 / (32 + 8))
        assert 0.9 * bound < adapter.down_proj.weight.abs().max() <= bound


@torch.no_grad()
def test_published_start_is_not_the_identity(make_host, images_for):
    host = make_host(embed_dim=64)
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "adapter:init=noah,bottleneck=64").eval()
    for unit in model.backbone.units("mlp"):
        adapter = unit.sequential["adapter"]
        assert adapter.down_proj.bias.abs().max() == adapter.up_proj.bias.abs().max() == 0
        for projection in (adapter.down_proj, adapter.up_proj):
            assert projection.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model(images) - expected).abs().max() > 1e-4


def test_dropout_acts_on_the_hidden_values_while_training(randomise):
    adapter = randomise(Bottleneck(4, 1000, "gelu", 0.25, "zero")).train()
    seen = []
    adapter.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    torch.manual_seed(0)
    adapter(torch.ones(1, 4))
    adapter.eval()(torch.ones(1, 4))
    dropped, whole = seen
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.05)
    torch.testing.assert_close(dropped[dropped != 0], whole[dropped != 0] / 0.75)


def gradients(model, images):
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("where", PLACES)
def test_gradients_reach_adapters_and_head_alone_also_when_recomputed(make_host, images_for, where):
    model = filled(dyntune.tune(make_host(), f"adapter:where={where},dropout=0")).train()
    images = images_for(model.backbone.host, 4)
    plain = gradients(model, images)
    expected = {
        f"blocks.{block}.{unit}.sequential.adapter.{projection}_proj.{kind}"
        for block in range(3)
        for unit in where.split("-")
        for projection in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert plain.keys() == expected | {"host.head.weight", "host.head.bias"} == model.tuned_state().keys()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.backbone.host.set_grad_checkpointing(True)
    recomputed = gradients(model, images)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@torch.no_grad()
def test_published_names(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "adapter"))
    state = {}
    for name, tensor in model.backbone.named_parameters():
        name = name.removeprefix("host.").replace("mlp.sequential.adapter", "adapter")
        state[name.replace("down_proj", "ln1").replace("up_proj", "ln2")] = tensor.clone()
    assert {"blocks.0.adapter.ln1.weight", "blocks.2.adapter.ln2.bias", "blocks.1.mlp.fc1.weight"} < state.keys()
    other = dyntune.tune(make_host(seed=9), "adapter").eval()
    dyntune.load_published(other, state)
    images = images_for(model.backbone.host, 2)
    assert torch.equal(other(images), model(images))
    with pytest.raises(CheckpointError, match="has no place"):
        dyntune.load_published(dyntune.tune(make_host(), "adapter:where=attn"), state)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@torch.no_grad()
def test_tokens_that_skip_the_mlp_skip_its_adapter(make_host, images_for, execution):
    """Where every patch skips every MLP, only the class token's adapters are left to change anything."""
    model = filled(dyntune.tune(make_host(depth=1), "adapter", "dispatch"))
    unit = next(model.backbone.units("mlp"))
    unit.dispatcher.gate.weight.zero_()
    unit.dispatcher.gate.bias.fill_(-1.0)
    host = model.backbone.host
    seen = []
    hook = host.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = images_for(host, 2)
    model.run(images, execution=execution)
    hook.remove()
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    x = x + host.blocks[0].attn(host.blocks[0].norm1(x))
    torch.testing.assert_close(seen[0][:, 1:], x[:, 1:], atol=1e-5, rtol=1e-5)
    assert (seen[0][:, 0] - x[:, 0]).abs().max() > 1e-2


@torch.no_grad()
def test_merge_leaves_the_adapters_and_says_why(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "adapter"))
    images = images_for(model.backbone.host, 2)
    before = model(images)
    assert model.merge() is model
    assert model.unmerged == {"adapter": "an adapter is not linear"}
    torch.testing.assert_close(model(images), before)


def test_one_adapter_per_place_but_adaptformer_may_stand_beside(make_host):
    with pytest.raises(BackboneError, match=r"adapter is already installed at blocks\.0\.mlp"):
        dyntune.tune(make_host(), "adapter", "adapter:where=attn-mlp")
    dyntune.tune(make_host(), "adapter", "adaptformer")


@pytest.mark.parametrize(
    "options", [{"bottleneck": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"where": "layer"}, {"activation": "tanh"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="adapter: "):
        Adapter(**options)
