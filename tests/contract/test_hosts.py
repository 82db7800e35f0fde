"""What holds for every family of hosts: any part trains on it, skips tokens, is saved, loaded, merged and counted.

Every part meets the three hosts of another distribution (rotary embeddings, separate maps to queries, keys and values,
attention that the host computes as a whole), an EVA02 and both kinds of Swin, which have stages; of timm's other kinds
of ViT, each part meets a few.
"""

import re
import zlib

import pytest
import torch
import torch.nn.functional as F

import dyntune
from dyntune.backbones.sites import Change
from dyntune.core.places import Places
from dyntune.core.rotation import Rotation
from dyntune.parts.policies.gating import LearnedGate
from dyntune.parts.registry import registered

OUTSIDE = ("rotary", "apart", "windows")
SWIN = ("swin", "swinv2")
TIMM = (
    *("plain", "deit3", "clip", "siglip", "average", "qk_norm", "swiglu", "swiglu_packed", "oblong", "distilled"),
    *("res_post", "dinov3", "mixed", "pe", "post_norm", "naflex", "beit", "relpos"),
)
GATES = ("mlp", "attn", "attn-mlp", "layer")
OPTIONS = {
    "evit": "evit:layers=0/1",
    "dynamicvit": "dynamicvit:keep=0.8/0.5,layers=1/2",
    "pyra": "pyra:r=3",
    "auto": "auto:budget=0.8",
}
"""Parts whose defaults are for deeper hosts."""
REFUSED = {
    ("evit", "siglip"): "no class token",
    ("evit", "naflex"): "no class token",
    **{("evit", host): "no class token" for host in ("windows", *SWIN)},
    **{
        (part, host): "computed by the host as a whole"
        for part in ("tome", "pyra", "fpet", "dynamicvit", "auto")
        for host in ("windows", *SWIN)
    },
    **{
        (part, host): "among the image patches in their places"
        for part in ("vpt", "noah")
        for host in ("windows", *SWIN)
    },
    **{(part, host): "16 and 32 channels" for part in ("fact-tk", "fact-tt", "res-tuning-bypass") for host in SWIN},
    **{(part, "eva02"): "whole slots" for part in ("fact-tk", "fact-tt")},
    **{
        (part, host): "norms behind"
        for part in ("convpass", "res-tuning")
        for host in ("post_norm", "res_post", "swinv2")
    },
}
"""Pairings that are not defined, and what the error says."""
UNREACHED = r"^blocks\.2\.mlp\.reducers\.pyra\."
"""What a head that reads the class token alone does not read any more."""


def pairs():
    for part in registered():
        yield from ((host, part) for host in (*OUTSIDE, "eva02", *SWIN))
        start = zlib.crc32(part.encode())
        yield from ((TIMM[(start + step) % len(TIMM)], part) for step in (0, 3, 7))


@pytest.fixture
def build(make_host, randomise, outside):
    """``build(name)``: a host of any family with equal weights each time."""

    def make(name):
        if name not in OUTSIDE:
            return make_host(name)
        from dyntune.backbones.hosts import create_backbone

        return randomise(create_backbone(f"{name}:tiny", num_classes=5)).eval()

    return make


def trained(model, images_for, steps=2):
    torch.manual_seed(1)
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 8, step), torch.arange(8) % 5)
        optimiser.zero_grad()
        loss.total.backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
def half_open(model):
    """A few training steps may have opened or closed every gate."""
    for module in model.modules():
        if isinstance(module, LearnedGate):
            module.gate.weight.normal_()
            module.gate.bias.zero_()
    return model


@torch.no_grad()
def check(model, again, images, tmp_path):
    """Masked equals compact, what is counted is what runs, and the saved, the merged and the optimised model agree."""
    masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    with dyntune.MacCounter() as counter:
        model.run(images[:1], complete=bool(compact.gates))
    cost = dyntune.cost(model)
    if compact.gates:  # counted at their target rate
        assert cost.macs < counter.macs - cost.head_macs
    else:
        assert cost.macs == counter.macs - cost.head_macs
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=again)
    assert torch.equal(loaded(images), compact.logits)
    torch.testing.assert_close(dyntune.optimize(model)(images), compact.logits, atol=1e-4, rtol=1e-4)
    merged = model.merge()(images)
    torch.testing.assert_close(getattr(merged, "logits", merged), compact.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("host", "part"), pairs())
def test_a_part_on_a_host(build, images_for, tmp_path, host, part):
    spec = OPTIONS.get(part, part)
    reason = REFUSED.get((part, host))
    if reason:
        with pytest.raises(dyntune.DyntuneError, match=reason):
            dyntune.tune(build(host), spec)
        return
    torch.manual_seed(0)
    model = dyntune.tune(build(host), spec)
    before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
    trainable = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    trained(model, images_for, steps=8 if part == "noah" else 2)  # each step draws one size of noah's modules
    moved = {name for name, p in model.backbone.named_parameters() if not torch.equal(p, before[name])}
    still = trainable - moved - {name for name in trainable if re.search(UNREACHED, name)}
    assert moved <= trainable and not still
    check(half_open(model), build(host), images_for(model.backbone.host, 4, seed=9), tmp_path)


@pytest.mark.parametrize("where", GATES)
@pytest.mark.parametrize("host", [*OUTSIDE, "swinv2"])
def test_a_gate_on_a_host(build, images_for, tmp_path, host, where):
    if host in ("windows", "swinv2") and where != "mlp":
        with pytest.raises(dyntune.DyntuneError, match="computes as a whole"):
            dyntune.tune(build(host), "lora", f"dispatch:where={where}")
        return
    torch.manual_seed(0)
    model = half_open(trained(dyntune.tune(build(host), "lora:targets=q/v", f"dispatch:where={where}"), images_for))
    images = images_for(model.backbone.host, 4, seed=9)
    rates = [gate.values.mean().item() for gate in model.run(images).gates]
    assert 0 < sum(rates) / len(rates) < 1
    check(model, build(host), images, tmp_path)


@torch.no_grad()
def test_the_interface_computes_what_the_host_computes(build, images_for):
    for name in OUTSIDE:
        host = build(name)
        images = images_for(host, 3)
        expected = host(images)
        torch.testing.assert_close(dyntune.tune(host, "linear").eval()(images), expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_tokens_keep_their_positions_when_others_are_skipped(build, images_for):
    """Attention among the active tokens alone rotates each by where it lies: the straight-line computation agrees."""
    host = build("rotary")
    model = dyntune.tune(host, "dispatch:where=attn").eval()
    images = images_for(host, 1)
    for block in model.backbone.blocks:
        block.attn.dispatcher.gate.weight.normal_()
        block.attn.dispatcher.gate.bias.zero_()
    x = host.tokens(images)
    for block, hosted in zip(host.blocks, model.backbone.blocks, strict=True):
        logits = hosted.attn.dispatcher.gate(x[:, 1:]).squeeze(-1)[0]
        active = torch.cat([torch.ones(1, dtype=torch.bool), logits > 0]).nonzero().squeeze(1)
        q, k, v = block.attn.projected(block.norm1(x[:, active]))
        angles = host.angles(active - 1)
        cos, sin = angles
        first, second = q.chunk(2, dim=-1)
        q = q * cos + torch.cat([-second, first], dim=-1) * sin
        first, second = k.chunk(2, dim=-1)
        k = k * cos + torch.cat([-second, first], dim=-1) * sin
        attended = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)
        x = x.index_add(1, active, block.attn.proj(attended))
        x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(model(images), host.head(host.norm(x)[:, 0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("part", ["tome:r=3", "evit:layers=0/1"])
def test_a_token_of_several_patches_is_rotated_by_their_mean(build, images_for, part):
    model = dyntune.tune(build("rotary"), part).eval()
    tokens = model.run(images_for(model.backbone.host, 2)).tokens
    rows = tokens.rotation.rows(0, tokens.places, tokens.prefix)
    table = torch.cat([model.backbone.host.sin, model.backbone.host.cos], dim=1)
    for image in range(2):
        for token in range(tokens.patches.shape[1]):
            mean = table[:-1][tokens.provenance.owner[image] == token].mean(0)
            torch.testing.assert_close(rows[image, tokens.prefix + token, 0], mean)
    assert torch.equal(rows[:, 0, 0], table[-1].expand(2, -1))  # the class token is not rotated


@torch.no_grad()
def test_a_token_of_no_patch_and_one_of_a_ragged_batch_have_their_own_rotation():
    tables = torch.arange(24.0).view(1, 3, 1, 8)
    owner = torch.tensor([[2, -1, 2], [0, 0, -1]])
    rotation, places = Rotation(tables, half=False), Places().following(owner, 3)
    rows = rotation.rows(0, places, 1)
    still = [0.0] * 4 + [1.0] * 4
    assert rows[0, :, 0].tolist() == [still, still, still, tables[0, [0, 2], 0].mean(0).tolist()]
    assert rows[1, :, 0].tolist() == [still, tables[0, [0, 1], 0].mean(0).tolist(), still, still]
    index = torch.tensor([0, 3, 5])
    assert torch.equal(rotation.rows(0, places.taken(index), 1), rows.flatten(0, 1)[index])


@torch.no_grad()
@pytest.mark.parametrize("host", ["rotary", "apart"])
def test_biases_beside_the_maps_are_scaled_with_them(build, images_for, randomise, host):
    model = dyntune.tune(build(host), "ssf").eval()
    randomise(model.backbone)
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    merged = model.merge()
    torch.testing.assert_close(merged(images), expected, atol=1e-5, rtol=1e-5)
    assert all(getattr(block.attn, "v_bias", None) is None for block in merged.blocks)


@torch.no_grad()
@pytest.mark.parametrize(("host", "targets"), [("rotary", ["qkv", "fc1"]), ("apart", ["q_proj", "v_proj"])])
def test_peft_decorates_any_family(build, images_for, tmp_path, host, targets):
    peft = pytest.importorskip("peft")

    def wrapped():
        torch.manual_seed(1)
        return peft.get_peft_model(build(host), peft.LoraConfig(target_modules=targets, init_lora_weights=False))

    model = half_open(dyntune.tune(wrapped(), "dispatch:where=attn-mlp")).eval()
    images = images_for(model.backbone.host, 4)
    masked, compact = (model.run(images, execution=how).logits for how in ("masked", "compact"))
    torch.testing.assert_close(masked, compact, atol=1e-5, rtol=1e-5)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=build(host))
    assert torch.equal(loaded(images), compact)
    torch.testing.assert_close(model.merge()(images), compact, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_changes_of_parts_and_repeated_ones_fold_into_a_bias_that_stands_beside(build, images_for):
    class Moved(Change):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, x, y):
            return 2 * y + self.by

        def fold(self, site):
            site.weight.mul_(2)
            site.set_bias(self.by if site.bias is None else 2 * site.bias + self.by)

    model = dyntune.tune(build("rotary"), "linear").eval()
    for kind in ("q", "k", "v", "qkv"):
        for site in model.backbone.sites(kind):
            site.add(f"moved_{kind}", Moved(torch.randn(site.channels)))
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    torch.testing.assert_close(model.merge()(images), expected, atol=1e-4, rtol=1e-4)


def test_an_outside_family_takes_what_another_one_refuses(outside, monkeypatch):
    from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer

    from dyntune.backbones import hosts
    from dyntune.backbones.base import Backbone

    class Mine(Backbone):
        supported = "parallel blocks"
        knows = classmethod(lambda cls, host: isinstance(host, VisionTransformer))

    known = {**hosts.families(), "mine": Mine}
    monkeypatch.setattr(hosts, "families", lambda: known)
    host = VisionTransformer(embed_dim=16, depth=1, num_heads=2, block_fn=ParallelScalingBlock)
    with pytest.raises(TypeError, match="abstract"):  # it was asked, and is no whole family
        hosts.wrap(host)
