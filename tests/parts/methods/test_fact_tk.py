"""FacT-TK against a straight-line implementation, its closed forms and the published counts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.fact_tk import FactTK

DENSE_VIT_B = 17_581_972_224
PLAIN_MLP = ("plain", "deit3", "registers", "clip", "siglip", "average", "qk_norm", "oblong", "distilled")
"""The hosts that the public code could run on: it knows no gated MLP."""


def published_tensors(host, rank, seed=5):
    """Random tensors under the names and in the shapes of the public code, and the host's head."""
    width = host.embed_dim
    slots = sum(4 + 2 * block.mlp.fc1.out_features // width for block in host.blocks)
    shapes = {
        "FacTu.weight": (rank, width),
        "FacTv.weight": (width, rank),
        "FacTc": (rank, rank, rank),
        "FacTp": (rank, slots),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(shape, generator=generator) * shape[1] ** -0.5 for name, shape in shapes.items()}
    return tensors | {name: p.detach().clone() for name, p in host.named_parameters() if name.startswith("head.")}


def slots_of(tensors, first, count):
    """``F[i, j, k]``, the entry of slot ``first + k`` from value i behind U to value j in front of V."""
    return torch.einsum("ijm,mk->ijk", tensors["FacTc"], tensors["FacTp"][:, first : first + count])


def reference(host, tensors, images, scale, order="interleaved"):
    """The logits of the public code; or with ``order="contiguous"`` those of the paper's equation."""
    u, v = tensors["FacTu.weight"], tensors["FacTv.weight"]
    rank, width = u.shape
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    first = 0
    for block in host.blocks:
        batch, count, _ = x.shape
        attn, normed = block.attn, block.norm1(x)
        core = slots_of(tensors, first, 4)
        qkv = attn.qkv(normed)
        q, k, v_ = (
            (qkv[..., j * width : (j + 1) * width] + scale * F.linear(F.linear(normed, u) @ core[:, :, j], v))
            .reshape(batch, count, attn.num_heads, attn.head_dim)
            .permute(0, 2, 1, 3)
            for j in range(3)
        )
        weights = (attn.q_norm(q) @ attn.k_norm(k).transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
        mixed = attn.norm((weights @ v_).permute(0, 2, 1, 3).reshape(batch, count, width))
        x = x + block.ls1(attn.proj(mixed) + scale * F.linear(F.linear(mixed, u) @ core[:, :, 3], v))

        mlp, normed = block.mlp, block.norm2(x)
        n = mlp.fc1.out_features // width
        up, down = slots_of(tensors, first + 4, n), slots_of(tensors, first + 4 + n, n)
        hidden = F.linear(normed, u)
        if order == "interleaved":
            hidden = (hidden @ up.reshape(rank, n * rank)).reshape(batch, count, n, rank)
        else:
            hidden = torch.stack([hidden @ up[:, :, k] for k in range(n)], dim=2)
        inner = mlp.act(mlp.fc1(normed) + scale * F.linear(hidden, v).reshape(batch, count, n * width))
        hidden = F.linear(inner.reshape(batch, count, n, width), u)
        if order == "interleaved":
            hidden = hidden.reshape(batch, count, n * rank) @ down.reshape(rank, n * rank).T
        else:
            hidden = sum(hidden[:, :, k] @ down[:, :, k] for k in range(n))
        x = x + block.ls2(mlp.fc2(mlp.norm(inner)) + scale * F.linear(hidden, v))
        first += 4 + 2 * n
    return host.forward_head(host.norm(x))


@pytest.mark.parametrize("rank,parameters", [(16, 30_976), (32, 86_528)])
def test_published_counts(rank, parameters):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = dyntune.tune(host, f"fact-tk:rank={rank}")
    cost = dyntune.cost(model)
    assert (cost.trainable_params, cost.dense_macs) == (parameters, DENSE_VIT_B)
    assert cost.macs - DENSE_VIT_B == 12 * 197 * (13_824 * rank + 12 * rank**2) + 144 * rank**3
    model.merge()
    assert dyntune.cost(model).macs == DENSE_VIT_B


@pytest.mark.parametrize("ratio", [1, 2, 4])
def test_closed_form_counts(make_host, ratio):
    cost = dyntune.cost(dyntune.tune(make_host(mlp_ratio=ratio), "fact-tk:rank=3"))
    slots = 4 + 2 * ratio
    assert cost.trainable_params == 2 * 32 * 3 + 27 + 3 * slots * 3
    assert cost.macs - cost.dense_macs == 3 * (17 * ((10 + 2 * ratio) * 32 * 3 + slots * 9) + slots * 27)


@pytest.mark.parametrize("name,slots", [("swiglu", 4 + 12), ("swiglu_packed", 4 + 4 + 2)])
def test_slots_of_a_gated_mlp(make_host, name, slots):
    model = dyntune.tune(make_host(name), "fact-tk:rank=3")
    assert model.backbone.shared["fact-tk"].p.shape == (3, 3 * slots)


@torch.no_grad()
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
@pytest.mark.parametrize("host_name", PLAIN_MLP)
def test_public_checkpoint_gives_the_public_logits(make_host, images_for, host_name, order):
    host = make_host(host_name)
    images = images_for(host, 3)
    model = dyntune.tune(make_host(host_name), f"fact-tk:rank=6,scale=0.7,order={order}").eval()
    tensors = published_tensors(host, 6)
    dyntune.load_published(model, tensors | {n: p for n, p in model.tuned_state().items() if n.startswith("host.head")})
    expected = reference(host, tensors, images, 0.7, order)
    assert (expected - host(images)).abs().max() > 1e-2
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)


def test_checkpoint_of_another_rank_is_refused(make_host):
    with pytest.raises(CheckpointError, match="are the sizes the same"):
        dyntune.load_published(dyntune.tune(make_host(), "fact-tk:rank=5"), published_tensors(make_host(), 6))


@torch.no_grad()
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
def test_merged_host_alone_computes_the_same(make_host, randomise, images_for, host_name, order):
    host = make_host(host_name)
    kind = type(host.blocks[0].mlp.fc2)
    model = randomise(dyntune.tune(host, f"fact-tk:rank=6,scale=0.7,order={order}")).eval()
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
def test_interleaved_order_is_the_default_and_another_function(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    model = dyntune.tune(make_host(), "fact-tk:rank=4").eval()
    tensors = published_tensors(host, 4)
    dyntune.load_published(model, tensors)
    torch.testing.assert_close(model(images), reference(host, tensors, images, 1.0), atol=1e-5, rtol=1e-5)
    assert (model(images) - reference(host, tensors, images, 1.0, "contiguous")).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("order", ["interleaved", "contiguous"])
def test_each_slot_changes_by_its_own_product(make_host, order):
    host = make_host()
    block = host.blocks[1]
    before = [m.weight.clone() for m in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2)]
    model = dyntune.tune(host, f"fact-tk:rank=3,scale=2,order={order}")
    tensors = published_tensors(make_host(), 3)
    dyntune.load_published(model, tensors)
    model.merge()
    qkv, proj, fc1, fc2 = (
        m.weight - w
        for m, w in zip((block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2), before, strict=True)
    )
    u, v = tensors["FacTu.weight"], tensors["FacTv.weight"]
    core = slots_of(tensors, 12, 12)
    expected = [2 * v @ core[:, :, k].T @ u for k in range(4)]
    torch.testing.assert_close(torch.cat([qkv, proj]), torch.cat(expected), atol=1e-5, rtol=1e-5)
    for k in range(4):
        up, down = core[:, :, 4 + k].T, core[:, :, 8 + k].T
        if order == "interleaved":
            columns = slice(3 * k, 3 * k + 3)
            up, down = core[:, :, 4:8].reshape(3, 12)[:, columns].T, core[:, :, 8:].reshape(3, 12)[:, columns]
        at = slice(32 * k, 32 * k + 32)
        torch.testing.assert_close(fc1[at], 2 * v @ up @ u, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fc2[:, at], 2 * v @ down @ u, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_initialisation(make_host, images_for, host_name):
    host = make_host(host_name)
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "fact-tk").eval()
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    factors = model.backbone.shared["fact-tk"]
    assert not factors.v.weight.any()
    slots = factors.p.shape[1]
    bounds = {factors.u.weight: 32**-0.5, factors.c: math.sqrt(3) / 32, factors.p: math.sqrt(6 / (slots + 32))}
    for p, bound in bounds.items():
        assert 0.8 * bound < p.abs().max() <= bound


def test_dropout_acts_on_the_values_in_front_of_v(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "fact-tk:dropout=0.25")).train()
    seen = []
    v = model.backbone.shared["fact-tk"].v
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
    model = randomise(dyntune.tune(make_host("registers"), "fact-tk"))
    model(images_for(model.backbone.host, 2)).square().sum().backward()
    with_gradient = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.any()}
    assert with_gradient == set(model.tuned_state())
    assert len(with_gradient) == 4 + 2
    assert {f"shared.fact-tk.{name}" for name in ("u.weight", "v.weight", "c", "p")} < with_gradient


@pytest.mark.parametrize("ratio,path", [(2.7, "fc1 is 86 x 32"), (0.5, "fc1 is 16 x 32")])
def test_maps_that_are_not_made_of_whole_slots_are_refused(make_host, ratio, path):
    host = make_host(mlp_ratio=ratio)
    with pytest.raises(BackboneError, match=rf"blocks\.0\.mlp\.{path},.* whole slots of 32 x 32.*lora"):
        dyntune.tune(host, "fact-tk")
    assert type(host.blocks[0].attn.qkv) is torch.nn.Linear


def test_given_twice_is_refused(make_host):
    with pytest.raises(BackboneError, match="already installed"):
        dyntune.tune(make_host(), "fact-tk", "fact-tk:rank=4")


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"dropout": 1.0}, {"dropout": -0.1}, {"scale": "learnable"}, {"order": "paper"}]
)
def test_bad_options_are_refused(options):
    with pytest.raises(SpecError, match="fact-tk: "):
        FactTK(**options)
