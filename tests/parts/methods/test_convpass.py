"""ConvPass against a straight-line implementation, its closed forms and the published counts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.convpass import ConvBypass, ConvPass

DENSE_VIT_B = 17_581_972_224


def published_tensors(host, bottleneck=8, where=("attn", "mlp"), seed=5):
    """Random tensors under the names and in the shapes of the public code, and the host's head."""
    width = host.embed_dim
    shapes = {
        "adapter_down.weight": (bottleneck, width),
        "adapter_down.bias": (bottleneck,),
        "adapter_conv.weight": (bottleneck, bottleneck, 3, 3),
        "adapter_conv.bias": (bottleneck,),
        "adapter_up.weight": (width, bottleneck),
        "adapter_up.bias": (width,),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"blocks.{i}.adapter_{part}.{name}": 0.2 * torch.randn(shape, generator=generator)
        for i in range(len(host.blocks))
        for part in where
        for name, shape in shapes.items()
    }
    return tensors | {name: p.detach().clone() for name, p in host.named_parameters() if name.startswith("head.")}


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


def reference_bypass(normed, tensors, name, prefix, grid):
    """One bypass: patches as an image, every other token through the centre of the kernel."""
    if f"{name}.adapter_down.weight" not in tensors:
        return 0
    down, conv, up = (
        (tensors[f"{name}.adapter_{layer}.weight"], tensors[f"{name}.adapter_{layer}.bias"])
        for layer in ("down", "conv", "up")
    )
    hidden = quick_gelu(F.linear(normed, *down))
    alone = F.linear(hidden[:, :prefix], conv[0][:, :, 1, 1], conv[1])
    batch, _, channels = hidden.shape
    image = hidden[:, prefix:].permute(0, 2, 1).reshape(batch, channels, *grid)
    image = F.conv2d(F.pad(image, (1, 1, 1, 1)), *conv)
    mixed = torch.cat([alone, image.reshape(batch, channels, -1).permute(0, 2, 1)], dim=1)
    return F.linear(quick_gelu(mixed), *up)


def reference(host, tensors, images, scale, grid=None):
    """The logits of the public code."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    layout = host.num_prefix_tokens, grid or host.patch_embed.grid_size
    for i, block in enumerate(host.blocks):
        normed = block.norm1(x)
        x = x + block.ls1(block.attn(normed))
        x = x + scale * reference_bypass(normed, tensors, f"blocks.{i}.adapter_attn", *layout)
        normed = block.norm2(x)
        x = x + block.ls2(block.mlp(normed))
        x = x + scale * reference_bypass(normed, tensors, f"blocks.{i}.adapter_mlp", *layout)
    return host.forward_head(host.norm(x))


@pytest.mark.parametrize("where,parameters", [("attn-mlp", 327_552), ("attn", 163_776)])
def test_published_counts(where, parameters):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, f"convpass:where={where}"))
    assert (cost.trainable_params, cost.dense_macs) == (parameters, DENSE_VIT_B)
    assert cost.macs == {"attn-mlp": 17_642_793_216, "attn": DENSE_VIT_B + 30_410_496}[where]


@pytest.mark.parametrize("where,places", [("attn-mlp", 6), ("attn", 3), ("mlp", 3)])
@pytest.mark.parametrize("name,tokens", [("plain", 17), ("registers", 21), ("siglip", 16)])
def test_closed_form_counts(make_host, where, places, name, tokens):
    cost = dyntune.cost(dyntune.tune(make_host(name), f"convpass:where={where},bottleneck=5"))
    assert cost.trainable_params == places * (2 * 32 * 5 + 32 + 9 * 25 + 2 * 5)
    assert cost.macs - cost.dense_macs == places * tokens * (2 * 32 * 5 + 9 * 25)


@torch.no_grad()
def test_public_checkpoint_gives_the_public_logits_on_every_host(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 3)
    model = dyntune.tune(make_host(host_name), "convpass:scale=0.7").eval()
    tensors = published_tensors(host)
    dyntune.load_published(model, tensors | {n: p for n, p in model.tuned_state().items() if n.startswith("host.head")})
    expected = reference(host, tensors, images, 0.7)
    assert (expected - host(images)).abs().max() > 1e-2
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("where", ["attn", "mlp"])
def test_public_checkpoint_of_one_bypass_per_block(make_host, images_for, where):
    host = make_host()
    images = images_for(host, 2)
    model = dyntune.tune(make_host(), f"convpass:where={where},bottleneck=3").eval()
    tensors = published_tensors(host, 3, (where,))
    dyntune.load_published(model, tensors)
    torch.testing.assert_close(model(images), reference(host, tensors, images, 1.0), atol=1e-5, rtol=1e-5)
    with pytest.raises(CheckpointError, match="no place in convpass"):
        dyntune.load_published(model, published_tensors(host, 3))


@torch.no_grad()
def test_grid_is_that_of_the_images(make_host, images_for):
    host = make_host(dynamic_img_size=True)
    images = torch.randn(2, 3, 16, 48, generator=torch.Generator().manual_seed(0))
    model = dyntune.tune(make_host(dynamic_img_size=True), "convpass").eval()
    tensors = published_tensors(host)
    dyntune.load_published(model, tensors)
    torch.testing.assert_close(model(images), reference(host, tensors, images, 1.0, (2, 6)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_prefix_token_goes_through_the_bypass_by_itself(randomise):
    bypass = randomise(ConvBypass(6, 4, 1.0, 0.0, "xavier", 0.0)).eval()
    x = torch.randn(2, 3 + 6, 6, generator=torch.Generator().manual_seed(0))
    whole = bypass(Tokens(x, 3, (2, 3), prompts=2, normed=x))
    for token in range(3):
        picked = torch.cat([x[:, token : token + 1], x[:, 3:]], dim=1)
        alone = bypass(Tokens(picked, 1, (2, 3), normed=picked))
        torch.testing.assert_close(alone[:, 0], whole[:, token])
        torch.testing.assert_close(alone[:, 1:], whole[:, 3:])


@pytest.mark.parametrize("init", ["xavier", "identity"])
@pytest.mark.parametrize("bottleneck", [8, 5])
def test_initialisation(make_host, images_for, init, bottleneck):
    host = make_host()
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, f"convpass:init={init},bottleneck={bottleneck}").eval()
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    for unit in model.backbone.units("attn-mlp"):
        bypass = unit.parallel["convpass"]
        assert not any(p.any() for p in (bypass.down.bias, bypass.conv.bias, bypass.up.weight, bypass.up.bias))
        bound = math.sqrt(6 / (32 + bottleneck))
        assert 0.8 * bound < bypass.down.weight.abs().max() <= bound
        if init == "xavier":
            bound = math.sqrt(6 / (2 * 9 * bottleneck))
            assert 0.8 * bound < bypass.conv.weight.abs().max() <= bound
        else:
            image = torch.randn(1, bottleneck, 3, 4)
            assert torch.equal(bypass.conv(image), image)


def test_dropout_acts_on_the_hidden_values_and_drop_path_on_whole_images(make_host, randomise):
    model = randomise(dyntune.tune(make_host(drop_path_rate=0.5), "convpass:dropout=0.25,bottleneck=16,scale=3"))
    rates = [unit.parallel["convpass"].drop_path.p for unit in model.backbone.units("attn-mlp")]
    assert rates == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5])
    bypass = model.backbone.blocks[2].mlp.parallel["convpass"]
    seen = []
    bypass.up.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = torch.randn(64, 17, 32, generator=torch.Generator().manual_seed(0))
    tokens = Tokens(x, 1, (4, 4), normed=x)
    torch.manual_seed(0)
    dropped = bypass.train()(tokens)
    bypass.eval()(tokens)
    assert (seen[0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)
    torch.testing.assert_close(seen[0][seen[0] != 0], seen[1][seen[0] != 0] / 0.75)
    kept = dropped.flatten(1).any(1)
    assert 16 < kept.sum() < 48
    torch.testing.assert_close(dropped[kept], 3 * bypass.up(seen[0])[kept] / 0.5)


def test_gradients_reach_the_bypasses_and_the_head_alone(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host("registers"), "convpass"))
    model(images_for(model.backbone.host, 2)).square().sum().backward()
    with_gradient = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(model.tuned_state())
    assert {name.split(".parallel.")[-1] for name in with_gradient if "parallel" in name} == {
        f"convpass.{layer}.{kind}" for layer in ("down", "conv", "up") for kind in ("weight", "bias")
    }


@torch.no_grad()
@pytest.mark.parametrize("where", ["attn", "mlp", "attn-mlp"])
@pytest.mark.parametrize("name", ["registers", "siglip"])
def test_bypass_sees_every_token_whatever_a_gate_skips(make_host, randomise, images_for, where, name):
    host = make_host(name)
    model = randomise(dyntune.tune(host, "convpass", f"dispatch:where={where}"), 3).eval()
    norms = []
    for block in host.blocks:
        for norm in (block.norm1, block.norm2):
            norm.register_forward_hook(lambda _, args, out: norms.append(args[0].shape))
    images = images_for(host, 3)
    masked = model.run(images, execution="masked")
    assert len(norms) == 6
    rate = torch.cat([gate.values for gate in masked.gates]).mean()
    assert 0.05 < rate < 0.95
    norms.clear()
    compact = model.run(images, execution="compact")
    tokens = 16 + host.num_prefix_tokens
    assert norms == [(3, tokens, 32)] * 6
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)


def test_gate_around_a_layer_is_refused(make_host):
    with pytest.raises(BackboneError, match=r"convpass at blocks\.0\.attn looks at all tokens"):
        dyntune.tune(make_host(), "convpass", "dispatch:where=layer")


@torch.no_grad()
def test_merge_folds_the_scale_and_says_why_the_rest_stays(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "convpass:scale=0.3")).eval()
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    before = model.tuned_state()["blocks.0.mlp.parallel.convpass.up.bias"].clone()
    assert model.merge() is model
    assert "not linear" in model.unmerged["convpass:scale=0.3"]
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.backbone.blocks[0].mlp.parallel["convpass"].up.bias, 0.3 * before)


@pytest.mark.parametrize(
    "options",
    [{"bottleneck": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"init": "zero"}, {"where": "layer"}, {"scale": "x"}],
)
def test_bad_options_are_refused(options):
    with pytest.raises(SpecError, match="convpass: "):
        ConvPass(**options)
