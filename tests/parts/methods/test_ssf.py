"""SSF against straight-line code, the published counts, and its folding."""

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import RmsNorm

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only


def public_names(blocks):
    """Names and channels of the public code for the tests' hosts of width 32."""
    sites = {"patch_embed.ssf_{}_1": 32, "ssf_{}_1": 32}
    for index in range(blocks):
        sites |= {f"blocks.{index}.ssf_{{}}_1": 32, f"blocks.{index}.ssf_{{}}_2": 32}
        sites |= {f"blocks.{index}.attn.ssf_{{}}_1": 96, f"blocks.{index}.attn.ssf_{{}}_2": 32}
        sites |= {f"blocks.{index}.mlp.ssf_{{}}_1": 128, f"blocks.{index}.mlp.ssf_{{}}_2": 32}
    return sites


def test_published_counts():
    with shapes_only():
        model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), "ssf")
    cost = dyntune.cost(model)
    assert (cost.trainable_params, cost.macs) == (205_824, 17_581_972_224)


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "registers"])
def test_equals_straight_line_code_under_the_public_names(make_host, images_for, name):
    host = make_host(name)
    images = images_for(host, 2)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for public, channels in public_names(3).items():
        state[public.format("scale")] = 1 + 0.3 * torch.randn(channels, generator=generator)
        state[public.format("shift")] = 0.3 * torch.randn(channels, generator=generator)

    def ssf(x, place):
        return x * state[place.format("scale")] + state[place.format("shift")]

    tokens = host.patch_embed.proj(images).flatten(2).transpose(1, 2)
    x = host.norm_pre(host._pos_embed(ssf(tokens, "patch_embed.ssf_{}_1")))
    for index, block in enumerate(host.blocks):
        at, attn = f"blocks.{index}.", block.attn
        qkv = ssf(attn.qkv(ssf(block.norm1(x), at + "ssf_{}_1")), at + "attn.ssf_{}_1")
        q, k, v = qkv.reshape(2, -1, 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + block.ls1(ssf(attn.proj(mixed), at + "attn.ssf_{}_2"))
        hidden = ssf(block.mlp.fc1(ssf(block.norm2(x), at + "ssf_{}_2")), at + "mlp.ssf_{}_1")
        x = x + block.ls2(ssf(block.mlp.fc2(F.gelu(hidden)), at + "mlp.ssf_{}_2"))
    expected = host.head(ssf(host.norm(x), "ssf_{}_1")[:, 0])
    model = dyntune.tune(host, "ssf").eval()
    dyntune.load_published(model, state | {f"head.{n}": p.clone() for n, p in host.head.named_parameters()})
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_folds_into_the_plain_host(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 2)
    model = dyntune.tune(host, "ssf:init_std=0.3").eval()
    expected = model(images)
    merged = model.merge()
    assert merged is host
    assert not [name for name, _ in merged.named_modules() if "changes" in name]
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    assert dyntune.cost(model).macs == dyntune.cost(model).dense_macs
    assert dyntune.cost(model).trainable_params == 0


def test_a_missing_bias_is_made_when_folding(make_host):
    host = make_host("qk_norm")
    assert host.blocks[0].attn.qkv.bias is None
    dyntune.tune(host, "ssf").merge()
    assert host.blocks[0].attn.qkv.bias.shape == (96,)


def test_initialisation(make_host):
    torch.manual_seed(0)
    state = dyntune.tune(make_host(), "ssf").tuned_state()
    scales, shifts = (
        torch.cat([p for name, p in state.items() if name.endswith(f"ssf.{part}")]) for part in ("scale", "shift")
    )
    assert scales.mean().item() == pytest.approx(1, abs=0.003)
    for values in (scales, shifts):
        assert values.std().item() == pytest.approx(0.02, rel=0.1)


@torch.no_grad()
def test_can_start_as_the_identity(make_host, images_for):
    host = make_host("registers")
    images = images_for(host, 2)
    expected = host(images)
    torch.testing.assert_close(dyntune.tune(host, "ssf:init_std=0").eval()(images), expected, atol=1e-6, rtol=1e-5)


def test_a_norm_that_cannot_take_a_shift_is_refused_and_the_host_left_alone(make_host):
    host = make_host(norm_layer=RmsNorm)
    with pytest.raises(BackboneError, match=r"blocks\.0\.norm1 is a RmsNorm without"):
        dyntune.tune(host, "ssf")
    assert type(host.patch_embed.proj) is torch.nn.Conv2d
    dyntune.tune(host, "lora")


def test_negative_deviation_is_refused():
    with pytest.raises(SpecError, match="ssf: expected init_std"):
        dyntune.SSF(init_std=-1)
