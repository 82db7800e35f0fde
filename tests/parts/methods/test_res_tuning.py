"""Res-Tuning against straight-line code of its equations and the published sizes."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.res_tuning import ResTuning

DENSE_VIT_B = 17_581_972_224


@torch.no_grad()
def filled(model, seed=1):
    """The model with random values in everything that is tuned."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.tuned_state().items()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tuned_by(unit, y):
    tuner = unit.parallel["res_tuning"]
    hidden = y @ tuner.down_proj.weight.T + tuner.down_proj.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return hidden @ tuner.up_proj.weight.T + tuner.up_proj.bias


def straight_line(model, images):
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        entered, normed = x, block.norm1(x)
        x = x + block.ls1(block.attn(normed)) + tuned_by(unit.attn, normed)
        normed = block.norm2(x)
        x = x + block.ls2(block.mlp(normed)) + tuned_by(unit.mlp, normed) + tuned_by(unit, entered)
    return host.forward_head(host.norm(x))


def test_published_counts():
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, "res-tuning"))
    assert cost.trainable_params == 470_304
    assert cost.macs == DENSE_VIT_B + 3 * 29_048_832
    assert round(cost.macs / 1e9, 3) == 17.669


@pytest.mark.parametrize("name,tokens", [("plain", 17), ("siglip", 16), ("distilled", 18), ("oblong", 16)])
@pytest.mark.parametrize("bottleneck", [1, 5])
def test_closed_form_counts(make_host, name, tokens, bottleneck):
    cost = dyntune.cost(dyntune.tune(make_host(name), ResTuning(bottleneck=bottleneck)))
    assert cost.trainable_params == 9 * (2 * 32 * bottleneck + bottleneck + 32)
    assert cost.macs - cost.dense_macs == 9 * tokens * 2 * 32 * bottleneck


@torch.no_grad()
def test_logits_equal_straight_line_code(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 3)
    bare = host.forward_features(images)
    model = filled(dyntune.tune(host, "res-tuning"))
    for execution in ("masked", "compact"):
        logits = model.run(images, execution=execution).logits
        torch.testing.assert_close(logits, straight_line(model, images), atol=1e-5, rtol=1e-5)
    assert (model(images) - host.forward_head(bare)).abs().max() > 1e-3


@pytest.mark.parametrize("init", ["zero", "xavier"])
@torch.no_grad()
def test_start(make_host, images_for, init):
    host = make_host()
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, ResTuning(init=init)).eval()
    bound = math.sqrt(6 / (32 + 8))
    for unit in model.backbone.all_units():
        tuner = unit.parallel["res_tuning"]
        assert 0.9 * bound < tuner.down_proj.weight.abs().max() <= bound
        assert 0 < tuner.down_proj.bias.abs().max() < 1e-5
        if init == "zero":
            assert tuner.up_proj.weight.abs().max() == tuner.up_proj.bias.abs().max() == 0
        else:
            assert 0.9 * bound < tuner.up_proj.weight.abs().max() <= bound
            assert 0 < tuner.up_proj.bias.abs().max() < 1e-5
    if init == "zero":
        torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    else:
        assert (model(images) - expected).abs().max() > 1e-2


def gradients(model, images):
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.grad is not None}


def test_gradients_reach_tuners_and_head_alone_also_when_recomputed(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "res-tuning")).train()
    images = images_for(model.backbone.host, 4)
    plain = gradients(model, images)
    expected = {
        f"{unit.path}.parallel.res_tuning.{projection}_proj.{kind}"
        for unit in model.backbone.all_units()
        for projection in ("down", "up")
        for kind in ("weight", "bias")
    }
    assert len(expected) == 36
    assert plain.keys() == expected | {"host.head.weight", "host.head.bias"} == model.tuned_state().keys()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.backbone.host.set_grad_checkpointing(True)
    recomputed = gradients(model, images)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("execution", ["masked", "compact"])
@pytest.mark.parametrize("gate", ["mlp", "layer"])
@torch.no_grad()
def test_which_tuners_a_skipped_token_passes(make_host, images_for, execution, gate):
    """Every patch skips the gated unit of the one block there is."""
    model = filled(dyntune.tune(make_host(depth=1), "res-tuning", f"dispatch:where={gate}"))
    unit, host = model.backbone.blocks[0], model.backbone.host
    gated = unit if gate == "layer" else unit.mlp
    gated.dispatcher.gate.weight.zero_()
    gated.dispatcher.gate.bias.fill_(-1.0)
    seen = []
    hook = host.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images = images_for(host, 2)
    model.run(images, execution=execution)
    hook.remove()
    entered = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    expected = entered + tuned_by(unit, entered)
    if gate == "mlp":
        normed = host.blocks[0].norm1(entered)
        attended = host.blocks[0].attn(normed) + tuned_by(unit.attn, normed)
        expected = expected + attended + tuned_by(unit.mlp, host.blocks[0].norm2(entered + attended))
    torch.testing.assert_close(seen[0][:, 1:], expected[:, 1:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_merge_leaves_the_tuners_and_says_why(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "res-tuning"))
    images = images_for(model.backbone.host, 2)
    before = model(images)
    assert model.merge() is model
    assert model.unmerged == {"res-tuning": "a tuner is not linear"}
    torch.testing.assert_close(model(images), before)


def test_summary_says_that_it_is_a_reconstruction():
    assert "reconstruction" in ResTuning.summary()


def test_given_once(make_host):
    with pytest.raises(BackboneError, match=r"res_tuning is already installed at blocks\.0\.attn"):
        dyntune.tune(make_host(), "res-tuning", "res-tuning:bottleneck=4")


@pytest.mark.parametrize("options", [{"bottleneck": 0}, {"init": "noah"}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="res-tuning: "):
        ResTuning(**options)
