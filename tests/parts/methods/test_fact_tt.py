"""FacT-TT against a straight-line implementation, its closed forms and the published counts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.fact_tt import FactTT

DENSE_VIT_B = 17_581_972_224
PLAIN_MLP = ("plain", "deit3", "registers", "clip", "siglip", "average", "qk_norm", "oblong", "distilled")
"""The hosts that the public code could run on: it knows no gated MLP."""


def published_tensors(host, rank, seed=5):
    """Random tensors under the names and in the shapes of the public code, and the host's head."""
    width = host.embed_dim
    shapes = {"FacTu.weight": (rank, width), "FacTv.weight": (width, rank)}
    for i, block in enumerate(host.blocks):
        n = block.mlp.fc1.out_features // width
        shapes |= {f"blocks.{i}.attn.{name}_FacTs.weight": (rank, rank) for name in ("q", "k", "v", "proj")}
        shapes |= {f"blocks.{i}.mlp.fc1_FacTs.weight": (n * rank, rank)}
        shapes |= {f"blocks.{i}.mlp.fc2_FacTs.weight": (rank, n * rank)}
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return tensors | {name: p.detach().clone() for name, p in host.named_parameters() if name.startswith("head.")}


def reference(host, tensors, images, scale):
    """The logits of the public code."""
    u, v = tensors["FacTu.weight"], tensors["FacTv.weight"]
    rank, width = u.shape
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for i, block in enumerate(host.blocks):
        core = {
            name: tensors[f"blocks.{i}.{part}.{name}_FacTs.weight"]
            for part, name in [("attn", key) for key in ("q", "k", "v", "proj")] + [("mlp", "fc1"), ("mlp", "fc2")]
        }
        batch, count, _ = x.shape
        attn, normed = block.attn, block.norm1(x)
        qkv = attn.qkv(normed)
        q, k, v_ = (
            (qkv[..., j * width : (j + 1) * width] + scale * F.linear(F.linear(F.linear(normed, u), core[name]), v))
            .reshape(batch, count, attn.num_heads, attn.head_dim)
            .permute(0, 2, 1, 3)
            for j, name in enumerate(("q", "k", "v"))
        )
        weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
        mixed = attn.norm((weights @ v_).permute(0, 2, 1, 3).reshape(batch, count, width))
        update = attn.proj(mixed) + scale * F.linear(F.linear(F.linear(mixed, u), core["proj"]), v)
        x = x + block.ls1(update)

        mlp, normed = block.mlp, block.norm2(x)
        n = mlp.fc1.out_features // width
        hidden = F.linear(F.linear(normed, u), core["fc1"]).reshape(batch, count, n, rank)
        inner = mlp.act(mlp.fc1(normed) + scale * F.linear(hidden, v).reshape(batch, count, n * width))
        hidden = F.linear(inner.reshape(batch, count, n, width), u).reshape(batch, count, n * rank)
        x = x + block.ls2(mlp.fc2(mlp.norm(inner)) + scale * F.linear(F.linear(hidden, core["fc2"]), v))
    return host.forward_head(host.norm(x))


@pytest.mark.parametrize("rank,parameters,macs", [(4, 8_448, 0.131), (8, 21_504, 0.263), (16, 61_440, 0.530)])
def test_published_counts(rank, parameters, macs):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = dyntune.tune(host, f"fact-tt:rank={rank}")
    cost = dyntune.cost(model)
    assert (cost.trainable_params, cost.dense_macs) == (parameters, DENSE_VIT_B)
    assert cost.macs - DENSE_VIT_B == 12 * 197 * (13_824 * rank + 12 * rank**2)
    assert (cost.macs - DENSE_VIT_B) / 1e9 == pytest.approx(macs, abs=5e-4)
    model.merge()
    assert dyntune.cost(model).macs == DENSE_VIT_B


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_closed_form_counts(make_host, ratio):
    cost = dyntune.cost(dyntune.tune(make_host(mlp_ratio=ratio), "fact-tt:rank=3"))
    assert cost.trainable_params == 2 * 32 * 3 + 3 * (4 + 2 * ratio) * 9
    assert cost.macs - cost.dense_macs == 3 * 17 * ((10 + 2 * ratio) * 32 * 3 + (4 + 2 * ratio) * 9)


@torch.no_grad()
@pytest.mark.parametrize("host_name", PLAIN_MLP)
def test_public_checkpoint_gives_the_public_logits(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 3)
    model = dyntune.tune(make_host(host_name), "fact-tt:rank=6,scale=0.7").eval()
    tensors = published_tensors(host, 6)
    dyntune.load_published(model, tensors | {n: p for n, p in model.tuned_state().items() if n.startswith("host.head")})
    expected = reference(host, tensors, images, 0.7)
    assert (expected - host(images)).abs().max() > 1e-2
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_checkpoint_of_another_rank_is_refused(make_host):
    with pytest.raises(CheckpointError, match="are the sizes the same"):
        dyntune.load_published(dyntune.tune(make_host(), "fact-tt:rank=5"), published_tensors(make_host(), 6))


@torch.no_grad()
def test_merged_host_alone_computes_the_same(make_host, randomise, images_for, host_name):
    host = make_host(host_name)
    kind = type(host.blocks[0].mlp.fc2)
    model = randomise(dyntune.tune(host, "fact-tt:rank=6,scale=0.7")).eval()
    images = images_for(host, 3)
    expected = model(images)
    dense = {name.replace(".base.", "."): p.shape for name, p in host.named_parameters() if ".changes." not in name}
    assert model.merge() is host
    assert model.unmerged == {}
    torch.testing.assert_close(host(images), expected, atol=1e-4, rtol=1e-4)
    assert type(host.blocks[0].mlp.fc2) is kind
    assert {name: p.shape for name, p in host.named_parameters()} == dense
    assert {name.split(".")[0] for name, _ in model.backbone.named_parameters()} == {"host"}


@torch.no_grad()
def test_each_slot_changes_by_its_own_product(make_host):
    host = make_host()
    block = host.blocks[1]
    before = [m.weight.clone() for m in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
    model = dyntune.tune(host, "fact-tt:rank=3,scale=2")
    tensors = published_tensors(make_host(), 3)
    dyntune.load_published(model, tensors)
    model.merge()
    qkv, proj, fc1, fc2 = (
        m.weight - w
        for m, w in zip((block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2), before, strict=True)
    )
    u, v = tensors["FacTu.weight"], tensors["FacTv.weight"]
    core = {name.split(".")[3]: t for name, t in tensors.items() if name.startswith("blocks.1.")}
    expected = [2 * v @ core[f"{name}_FacTs"] @ u for name in ("q", "k", "v", "proj")]
    torch.testing.assert_close(torch.cat([qkv, proj]), torch.cat(expected), atol=1e-5, rtol=1e-5)
    for k in range(4):
        rows, at = slice(3 * k, 3 * k + 3), slice(32 * k, 32 * k + 32)
        torch.testing.assert_close(fc1[at], 2 * v @ core["fc1_FacTs"][rows] @ u, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fc2[:, at], 2 * v @ core["fc2_FacTs"][:, rows] @ u, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_initialisation(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "fact-tt").eval()
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    assert not model.backbone.shared["fact-tt"].v.weight.any()
    for name, p in model.tuned_state().items():
        if name.endswith("u.weight") or "changes" in name:
            assert 0.8 / math.sqrt(p.shape[1]) < p.abs().max() <= 1 / math.sqrt(p.shape[1])


def test_dropout_acts_on_the_values_in_front_of_v(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "fact-tt:dropout=0.25")).train()
    seen = []
    v = model.backbone.shared["fact-tt"].v
    hook = v.register_forward_pre_hook(lambda _, args: seen.append((args[0] == 0).float().mean().item()))
    torch.manual_seed(0)
    model(images_for(model.backbone.host, 4))
    assert len(seen) == 3 * 6
    assert seen == pytest.approx([0.25] * 18, abs=0.06)
    seen.clear()
    model.eval()(images_for(model.backbone.host, 4))
    hook.remove()
    assert seen == [0] * 18


def test_gradients_reach_the_factors_and_the_head_alone(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host("registers"), "fact-tt"))
    model(images_for(model.backbone.host, 2)).square().sum().backward()
    with_gradient = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(model.tuned_state())
    assert len(with_gradient) == 2 + 3 * 6 + 2
    assert {"shared.fact-tt.u.weight", "shared.fact-tt.v.weight"} < with_gradient


@pytest.mark.parametrize("ratio,path", [(2.7, "fc1 is 86 x 32"), (0.5, "fc1 is 16 x 32")])
def test_maps_that_are_not_made_of_whole_slots_are_refused(make_host, ratio, path):
    host = make_host(mlp_ratio=ratio)
    with pytest.raises(BackboneError, match=rf"blocks\.0\.mlp\.{path},.* whole slots of 32 x 32.*lora"):
        dyntune.tune(host, "fact-tt")
    assert type(host.blocks[0].attn.qkv) is torch.nn.Linear


def test_given_twice_is_refused(make_host):
    with pytest.raises(BackboneError, match="already installed"):
        dyntune.tune(make_host(), "fact-tt", "fact-tt:rank=4")


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"scale": "learnable"}])
def test_bad_options_are_refused(options):
    with pytest.raises(SpecError, match="fact-tt: "):
        FactTT(**options)
