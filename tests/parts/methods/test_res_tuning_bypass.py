"""Res-Tuning-Bypass against straight-line code, the counts of its public component and its tensor names."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.res_tuning_bypass import ResTuningBypass

DENSE_VIT_B = 17_581_972_224
VARIANTS = (
    "res-tuning-bypass:bottleneck=8",
    "res-tuning-bypass:bottleneck=4/6/8",
    "res-tuning-bypass:bottleneck=8,scale=0.3",
    "res-tuning-bypass:bottleneck=8,scale=learnable",
    "res-tuning-bypass:bottleneck=8,scale=channel",
    "res-tuning-bypass:bottleneck=8,scale=gate",
    "res-tuning-bypass:bottleneck=8,merging=average",
)


def vit_base():
    with shapes_only():
        return timm.create_model("vit_base_patch16_224", num_classes=100)


@torch.no_grad()
def filled(model, seed=1):
    """The model with random values in everything that is tuned."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.tuned_state().items()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tuner_output(tuner, y):
    hidden = y @ tuner.down_proj.weight.T + tuner.down_proj.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    update = hidden @ tuner.up_proj.weight.T + tuner.up_proj.bias
    if isinstance(tuner.scale, torch.nn.Linear):
        opened = torch.sigmoid(update @ tuner.scale.weight[0] + tuner.scale.bias)
        return y + update * opened.mean(1)[:, None, None]
    return y + update * tuner.scale


def straight_line(model, images):
    host, bypass = model.backbone.host, model.backbone.bypass
    x = stream = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for index, block in enumerate(host.blocks):
        x = block(x)
        lateral, vertical = tuner_output(bypass.lateral[index], x), tuner_output(bypass.vertical[index], stream)
        if bypass.share is None:
            stream = lateral + vertical
        else:
            share = 1 / (1 + torch.exp(-bypass.share[index]))
            stream = share * lateral + (1 - share) * vertical
    return host.forward_head(host.norm(stream))


@pytest.mark.parametrize("bottleneck,parameters", [(8, 313_536), (10, 387_312), (32, 1_198_848)])
def test_published_counts(bottleneck, parameters):
    cost = dyntune.cost(dyntune.tune(vit_base(), ResTuningBypass(bottleneck=bottleneck)))
    assert cost.trainable_params == parameters
    assert cost.macs - DENSE_VIT_B == 24 * 197 * 2 * 768 * bottleneck
    assert cost.dense_macs == DENSE_VIT_B


@pytest.mark.parametrize("name,tokens", [("plain", 17), ("siglip", 16), ("distilled", 18), ("oblong", 16)])
@pytest.mark.parametrize(
    "options,parameters,macs",
    [
        ({"bottleneck": 5}, 6 * (2 * 32 * 5 + 5 + 32), 6 * 2 * 32 * 5),
        ({"bottleneck": (1, 2, 3)}, 2 * (2 * 32 * 6 + 6 + 3 * 32), 2 * 2 * 32 * 6),
        ({"bottleneck": 1, "scale": "learnable"}, 6 * (2 * 32 + 1 + 32 + 1), 6 * 2 * 32),
        ({"bottleneck": 1, "scale": "channel"}, 6 * (2 * 32 + 1 + 32 + 32), 6 * 2 * 32),
        ({"bottleneck": 1, "scale": "gate"}, 6 * (2 * 32 + 1 + 32 + 33), 6 * 3 * 32),
        ({"bottleneck": 1, "merging": "average"}, 6 * (2 * 32 + 1 + 32) + 3, 6 * 2 * 32),
    ],
)
def test_closed_form_counts(make_host, name, tokens, options, parameters, macs):
    cost = dyntune.cost(dyntune.tune(make_host(name), ResTuningBypass(**options)))
    assert cost.trainable_params == parameters
    assert cost.macs - cost.dense_macs == tokens * macs


@pytest.mark.parametrize("spec", VARIANTS)
@torch.no_grad()
def test_logits_equal_straight_line_code(make_host, images_for, host_name, spec):
    host = make_host(host_name)
    images = images_for(host, 3)
    bare = host.forward_features(images)
    model = filled(dyntune.tune(host, spec))
    for execution in ("masked", "compact"):
        logits = model.run(images, execution=execution).logits
        torch.testing.assert_close(logits, straight_line(model, images), atol=1e-5, rtol=1e-5)
    assert (model(images) - host.forward_head(bare)).abs().max() > 1e-3


@pytest.mark.parametrize("zero_init_last", [False, True])
@torch.no_grad()
def test_start(make_host, zero_init_last):
    torch.manual_seed(0)
    bypass = dyntune.tune(make_host(), ResTuningBypass(zero_init_last=zero_init_last)).backbone.bypass
    bound = math.sqrt(6 / (32 + 32))
    for tuners in (bypass.lateral, bypass.vertical):
        for index, tuner in enumerate(tuners):
            assert tuner.scale == 1
            for projection in (tuner.down_proj, tuner.up_proj):
                if zero_init_last and index == 2 and projection is tuner.up_proj:
                    assert projection.weight.abs().max() == projection.bias.abs().max() == 0
                    continue
                assert 0.9 * bound < projection.weight.abs().max() <= bound
                assert 0 < projection.bias.abs().max() < 1e-5


@torch.no_grad()
def test_trained_factors_start_at_one_and_shares_at_a_half(make_host):
    for scale in ("learnable", "channel"):
        bypass = dyntune.tune(make_host(), ResTuningBypass(scale=scale)).backbone.bypass
        assert all((tuner.scale == 1).all() for tuner in bypass.lateral)
    bypass = dyntune.tune(make_host(), "res-tuning-bypass:merging=average").backbone.bypass
    assert bypass.share.sigmoid().tolist() == [0.5] * 3


def gradients(model, images):
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", VARIANTS)
def test_gradients_reach_bypass_and_head_alone_also_with_checkpointing(make_host, images_for, spec):
    model = filled(dyntune.tune(make_host(), spec)).train()
    images = images_for(model.backbone.host, 4)
    plain = gradients(model, images)
    bypass = {f"bypass.{name}" for name, _ in model.backbone.bypass.named_parameters()}
    assert plain.keys() == bypass | {"host.head.weight", "host.head.bias"} == model.tuned_state().keys()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.backbone.host.set_grad_checkpointing(True)
    again = gradients(model, images)
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)


@pytest.mark.parametrize("name", ["plain", "clip", "siglip"])
def test_blocks_run_without_gradient_even_where_it_is_asked_for(make_host, images_for, name):
    model = filled(dyntune.tune(make_host(name), "res-tuning-bypass")).train()
    model.backbone.host.requires_grad_(True)
    seen = []
    model.backbone.bypass.lateral[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.backbone.bypass.vertical[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    reached = gradients(model, images_for(model.backbone.host, 2))
    assert [x.requires_grad for x in seen] == [False, False]
    behind = ("bypass.", "host.norm.", "host.fc_norm.", "host.attn_pool.", "host.head.")
    assert all(name.startswith(behind) for name in reached)


@pytest.mark.parametrize("spec", VARIANTS[:-1])
@torch.no_grad()
def test_published_names(make_host, images_for, spec):
    model = filled(dyntune.tune(make_host(), spec))
    state = {}
    for index in range(3):
        for stage in ("lateral", "vertical"):
            tuner = getattr(model.backbone.bypass, stage)[index]
            names = {"down_proj.": "ln1.", "up_proj.": "ln2.", "scale": "scaling"}
            for name, tensor in tuner.named_parameters():
                public = next(name.replace(own, other) for own, other in names.items() if name.startswith(own))
                state[f"restuning_default.bypass_blocks.{index}.{stage}_tuner.tuner.{public}"] = tensor.clone()
    assert len(state) == len(list(model.backbone.bypass.parameters()))
    state |= {"head.weight": model.backbone.host.head.weight, "head.bias": model.backbone.host.head.bias}
    other = dyntune.tune(make_host(), spec).eval()
    dyntune.load_published(other, state)
    images = images_for(model.backbone.host, 2)
    assert torch.equal(other(images), model(images))


@pytest.mark.parametrize("other", ["adaptformer", "adapter", "vpt", "res-tuning", "full"])
@pytest.mark.parametrize("first", [True, False])
def test_what_would_get_no_gradient_is_refused(make_host, other, first):
    host = make_host()
    before = {name: p.requires_grad for name, p in host.named_parameters()}
    parts = ("res-tuning-bypass", other) if first else (other, "res-tuning-bypass")
    with pytest.raises(BackboneError, match=r"lets no gradient into the backbone, so .* Give the bypass alone"):
        dyntune.tune(host, *parts)
    assert {name: p.requires_grad for name, p in host.named_parameters()} == before


@pytest.mark.parametrize("where", ["attn", "mlp", "attn-mlp", "layer"])
def test_dispatch_is_refused(make_host, where):
    with pytest.raises(BackboneError, match="so dispatch cannot stand beside it"):
        dyntune.tune(make_host(), "res-tuning-bypass", f"dispatch:where={where}")


def test_one_bypass_alone(make_host):
    with pytest.raises(BackboneError, match="has a bypass already"):
        dyntune.tune(make_host(), "res-tuning-bypass", "res-tuning-bypass:bottleneck=8")
    dyntune.tune(make_host(), "res-tuning-bypass", "linear")


@torch.no_grad()
def test_merge_leaves_the_bypass_and_says_why(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "res-tuning-bypass"))
    images = images_for(model.backbone.host, 2)
    before = model(images)
    assert model.merge() is model
    assert "beside the blocks" in model.unmerged["res-tuning-bypass"]
    torch.testing.assert_close(model(images), before)


@pytest.mark.parametrize("sizes", [(4, 8), (1, 2, 3, 4)])
def test_bottlenecks_are_given_for_each_block(make_host, sizes):
    with pytest.raises(BackboneError, match=f"bottleneck has {len(sizes)} numbers, but the backbone 3 blocks"):
        dyntune.tune(make_host(), ResTuningBypass(bottleneck=sizes))


@pytest.mark.parametrize(
    "options", [{"bottleneck": 0}, {"bottleneck": (8, 0, 8)}, {"bottleneck": ()}, {"scale": "mean"}, {"merging": "max"}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="res-tuning-bypass: "):
        ResTuningBypass(**options)
