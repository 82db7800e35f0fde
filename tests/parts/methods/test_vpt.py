"""VPT against straight-line code, the published counts and the names of the public code."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.vpt import Prompts, Vpt

DENSE_VIT_B = 17_581_972_224
VARIANTS = ("vpt:prompts=3", "vpt:prompts=3,deep=false")


def vit_base():
    with shapes_only():
        return timm.create_model("vit_base_patch16_224", num_classes=100)


@torch.no_grad()
def filled(model, seed=1):
    """The model with random values in everything that is tuned."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(model.tuned_state().items()):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model.eval()


def prompts_of(model):
    return [block.prompts["vpt"].prompts for block in model.backbone.blocks if "vpt" in block.prompts]


def straight_line(host, prompts, images):
    """``prompts`` holds one set for each block, or a single one that goes through all of them."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    own, count = host.num_prefix_tokens, len(prompts[0])
    for index, block in enumerate(host.blocks):
        if index < len(prompts):
            patches = x[:, own:] if index == 0 else x[:, own + count :]
            x = torch.cat([x[:, :own], torch.stack([prompts[index]] * len(x)), patches], dim=1)
        x = x + block.ls1(block.attn(block.norm1(x)))
        x = x + block.ls2(block.mlp(block.norm2(x)))
    x = host.norm(x)
    return host.forward_head(torch.cat([x[:, :own], x[:, own + count :]], dim=1))


@pytest.mark.parametrize("deep", [True, False])
def test_published_counts(deep):
    cost = dyntune.cost(dyntune.tune(vit_base(), Vpt(deep=deep)))
    assert cost.trainable_params == (73_728 if deep else 6_144)
    assert (cost.macs, cost.dense_macs) == (18_321_494_784, DENSE_VIT_B)


@pytest.mark.parametrize(
    "prompts,giga", [(1, 17.674), (5, 18.044), (10, 18.507), (50, 22.243), (100, 26.996), (200, 36.778)]
)
def test_published_counts_of_other_numbers_of_prompts(prompts, giga):
    cost = dyntune.cost(dyntune.tune(vit_base(), Vpt(prompts=prompts)))
    assert cost.trainable_params == 9_216 * prompts
    assert round(cost.macs / 1e9, 3) == giga


@pytest.mark.parametrize("name,tokens", [("plain", 17), ("siglip", 16), ("distilled", 18), ("oblong", 16)])
@pytest.mark.parametrize("prompts,deep", [(1, True), (5, False)])
def test_closed_form_counts(make_host, name, tokens, prompts, deep):
    cost = dyntune.cost(dyntune.tune(make_host(name), Vpt(prompts=prompts, deep=deep)))
    assert cost.trainable_params == 32 * prompts * (3 if deep else 1)
    block = prompts * (4 * 32**2 + 2 * 32 * 128 + 10 * 32) + 2 * 32 * ((tokens + prompts) ** 2 - tokens**2)
    assert cost.macs - cost.dense_macs == 3 * block + 5 * prompts * 32


@pytest.mark.parametrize("spec", VARIANTS)
@torch.no_grad()
def test_logits_equal_straight_line_code(make_host, images_for, host_name, spec):
    host = make_host(host_name)
    images = images_for(host, 3)
    bare = host(images)
    model = filled(dyntune.tune(host, spec))
    for execution in ("masked", "compact"):
        logits = model.run(images, execution=execution).logits
        torch.testing.assert_close(logits, straight_line(host, prompts_of(model), images), atol=1e-5, rtol=1e-5)
    model.backbone.host.load_state_dict(make_host(host_name).state_dict())
    assert (model(images) - bare).abs().max() > 1e-3


def test_prompts_stand_between_prefix_and_patches_and_replace_each_other(make_host, images_for):
    model = filled(dyntune.tune(make_host("registers"), "vpt:prompts=3"))
    tokens = model.backbone.embed(images_for(model.backbone.host, 2))
    first, second = (block.enter for block in model.backbone.blocks[:2])
    once = first(tokens)
    twice = second(once)
    assert (tokens.prefix, once.prefix, twice.prefix, once.prompts, twice.prompts) == (5, 8, 8, 3, 3)
    assert torch.equal(twice.x[1, 5:8], prompts_of(model)[1])
    assert torch.equal(torch.cat([twice.x[:, :5], twice.x[:, 8:]], dim=1), tokens.x)
    shallow = dyntune.tune(make_host("registers"), "vpt:prompts=3,deep=false")
    assert [len(block.prompts) for block in shallow.backbone.blocks] == [1, 0, 0]


@pytest.mark.parametrize("changes", [{}, {"patch_size": 4}, {"in_chans": 1}, {"embed_dim": 64}])
def test_prompts_start_uniform_within_the_bound_of_the_patch_embedding(make_host, changes):
    torch.manual_seed(0)
    host = make_host(**changes)
    bound = math.sqrt(6 / (host.in_chans * host.patch_embed.patch_size[0] ** 2 + host.embed_dim))
    for prompts in prompts_of(dyntune.tune(host, "vpt:prompts=100")):
        assert 0.98 * bound < prompts.max() <= bound
        assert -bound <= prompts.min() < -0.98 * bound
        assert prompts.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_starting_bound_of_the_published_models():
    patch = next(dyntune.tune(vit_base(), "vpt").backbone.sites("patch")).module
    assert math.sqrt(6 / (patch.weight[0].numel() + 768)) == 0.0625


def test_dropout_is_drawn_for_each_image_and_only_while_training():
    prompts = Prompts(50, 40, 1.0, 0.25).train()
    torch.manual_seed(0)
    out = prompts(Tokens(torch.zeros(3, 5, 40), 1, (2, 2))).x[:, 1:51]
    kept = out != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    assert not torch.equal(kept[0], kept[1])
    torch.testing.assert_close(out[kept], (prompts.prompts.expand(3, -1, -1) / 0.75)[kept])
    whole = prompts.eval()(Tokens(torch.zeros(3, 5, 40), 1, (2, 2))).x[:, 1:51]
    assert torch.equal(whole, prompts.prompts.expand(3, -1, -1))


def gradients(model, images):
    model.zero_grad()
    F.cross_entropy(model(images), torch.arange(len(images)) % 5).backward()
    return {name: p.grad.clone() for name, p in model.backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("spec", VARIANTS)
def test_gradients_reach_prompts_and_head_alone_also_when_recomputed(make_host, images_for, spec):
    model = filled(dyntune.tune(make_host(), spec)).train()
    images = images_for(model.backbone.host, 4)
    plain = gradients(model, images)
    blocks = range(3) if "deep" not in spec else range(1)
    expected = {f"blocks.{block}.prompts.vpt.prompts" for block in blocks}
    assert plain.keys() == expected | {"host.head.weight", "host.head.bias"} == model.tuned_state().keys()
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    model.backbone.host.set_grad_checkpointing(True)
    recomputed = gradients(model, images)
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


@pytest.mark.parametrize("prefix", ["", "enc."])
@pytest.mark.parametrize("spec", VARIANTS)
@torch.no_grad()
def test_published_names(make_host, images_for, spec, prefix):
    model = filled(dyntune.tune(make_host(), spec))
    first, *deep = prompts_of(model)
    state = {f"{prefix}transformer.prompt_embeddings": first[None]}
    if deep:
        state[f"{prefix}transformer.deep_prompt_embeddings"] = torch.stack(deep)
    head = "head.last_layer" if prefix else "head"
    state |= {f"{head}.{name}": p for name, p in model.backbone.host.head.named_parameters()}
    other = dyntune.tune(make_host(), spec).eval()
    dyntune.load_published(other, {name: tensor.clone() for name, tensor in state.items()})
    images = images_for(model.backbone.host, 2)
    assert torch.equal(other(images), model(images))
    if deep:
        with pytest.raises(CheckpointError, match="has no place"):
            dyntune.load_published(dyntune.tune(make_host(), VARIANTS[1]), state)


@torch.no_grad()
def test_merge_leaves_the_prompts_and_says_why(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "vpt"))
    images = images_for(model.backbone.host, 2)
    before = model(images)
    assert model.merge() is model
    assert "prompts are tokens" in model.unmerged["vpt"]
    assert torch.equal(model(images), before)


def test_one_method_alone_inserts_tokens(make_host):
    with pytest.raises(BackboneError, match=r"both insert tokens at blocks\.0"):
        dyntune.tune(make_host(), "vpt", "vpt:deep=false")


@pytest.mark.parametrize("options", [{"prompts": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="vpt: expected"):
        Vpt(**options)
