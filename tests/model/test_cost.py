"""Counts against the published tables and against closed forms at the numbers of tokens that really ran."""

import copy
import json
from functools import partial
from math import ceil

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import TensorDataset

import dyntune
from dyntune.backbones.hosts import wrap
from dyntune.core.errors import BackboneError, DataError
from dyntune.core.shapes import shapes_only
from dyntune.model.macs import FusedAttention, MacCounter, Watch, trace
from dyntune.model.tasks import Metric
from dyntune.parts.registry import resolve
from dyntune.training.evaluate import evaluate

DENSE_VIT_B = 17_581_972_224
RATES = (0.5, 0.7, 0.9, 1.0)
VARIANTS = ("attn", "mlp", "attn-mlp", "layer")
# Billions of MACs of ViT-B/16, active tokens attending to active tokens, by variant and then bottleneck, for RATES.
TABLE = {
    ("attn", 8): (14.299, 15.582, 16.922, 17.613),
    ("mlp", 8): (12.059, 14.281, 16.502, 17.613),
    ("attn-mlp", 8): (8.776, 12.281, 15.842, 17.644),
    ("layer", 8): (8.746, 12.250, 15.811, 17.613),
    ("attn", 64): (14.502, 15.785, 17.125, 17.816),
    ("mlp", 64): (12.263, 14.484, 16.705, 17.816),
    ("attn-mlp", 64): (9.183, 12.687, 16.249, 18.050),
    ("layer", 64): (8.949, 12.453, 16.014, 17.816),
}


def on_meta(name, **options):
    with shapes_only():
        return timm.create_model(name, **options)


@pytest.fixture(scope="module")
def small_vit_b():
    """One block of ViT-B/16 stands for twelve equal ones; returns ``cost(spec)`` of the whole."""

    def counted(spec):
        with torch.device("meta"):
            host = VisionTransformer(depth=1, num_classes=100)
        cost = dyntune.cost(dyntune.tune(host, spec))
        outside = 196 * 768 * 768 + 5 * 197 * 768
        return outside + 12 * (cost.macs - outside), 12 * cost.trainable_params

    return counted


@pytest.mark.parametrize("variant,bottleneck", TABLE)
def test_table_of_the_four_variants(small_vit_b, variant, bottleneck):
    for rate, published in zip(RATES, TABLE[variant, bottleneck], strict=True):
        macs, params = small_vit_b(f"dyt:recipe=published,dispatch={variant},bottleneck={bottleneck},rate={rate}")
        assert macs / 1e9 == pytest.approx(published, abs=6e-4)
        places = 24 if variant == "attn-mlp" else 12
        assert params == places * (2 * 768 * bottleneck + bottleneck + 768 + 769)


@pytest.mark.parametrize(
    "spec,macs,params",
    [
        ("linear", DENSE_VIT_B, 0),
        ("dyt:recipe=published,rate=1", 17_612_827_392, 165_996),
        ("dyt:recipe=published,rate=0.5", 12_059_247_360, 165_996),
        ("dyt:recipe=published,bottleneck=64,rate=1", 17_612_827_392 + 12 * 2 * 197 * 768 * 56, 1_198_860),
        ("dyt:recipe=published,bottleneck=64,experts=4,rate=1", None, 4_795_392 + 9_228),
    ],
)
def test_published_numbers_of_vit_b(spec, macs, params):
    model = dyntune.tune(on_meta("vit_base_patch16_224", num_classes=100), spec)
    cost = dyntune.cost(model)
    assert cost.dense_macs == DENSE_VIT_B
    assert cost.head_macs == 76_800
    assert macs is None or cost.macs == macs
    assert cost.trainable_params == params
    assert cost.adapter_bytes == 4 * (params + cost.head_params)
    assert cost.model.startswith("vit_base_patch16_224")
    assert (cost.method, cost.tokens) == (model.spec, None)


def test_policies_are_named_apart_from_methods(make_host):
    cost = dyntune.cost(dyntune.tune(make_host(), "adaptformer", "dispatch:rate=0.25"))
    assert (cost.model, cost.method, cost.tokens) == ("VisionTransformer", "adaptformer", "dispatch:rate=0.25")


def dense(depth, tokens, width, hidden):
    return depth * (4 * tokens * width**2 + 2 * tokens**2 * width + 2 * tokens * width * hidden + 10 * tokens * width)


@pytest.mark.parametrize(
    "name,options,expected",
    [
        (
            "vit_small_patch14_dinov2",
            {"img_size": 224},
            256 * 14 * 14 * 3 * 384 + dense(12, 257, 384, 1536) + 5 * 257 * 384,
        ),
        (
            "vit_small_patch14_reg4_dinov2",
            {"img_size": 224},
            256 * 14 * 14 * 3 * 384 + dense(12, 261, 384, 1536) + 5 * 261 * 384,
        ),
        (
            "vit_base_patch16_clip_224",
            {},
            196 * 768 * 768 + dense(12, 197, 768, 3072) + 2 * 5 * 197 * 768,
        ),
        (
            "vit_base_patch16_siglip_224",
            {},
            196 * 768 * 768
            + dense(12, 196, 768, 3072)
            + 5 * 196 * 768
            + (2 * 768**2 + 2 * 196 * 768**2 + 2 * 196 * 768 + 5 * 768 + 2 * 768 * 3072),
        ),
    ],
)
def test_other_families_follow_their_closed_forms(name, options, expected):
    cost = dyntune.cost(dyntune.tune(on_meta(name, num_classes=10, **options), "dyt:surrogate=none,rate=1"))
    width, prefix, patches = (384, 1, 256) if "dinov2" in name else (768, 1, 196)
    prefix = 5 if "reg4" in name else 0 if "siglip" in name else prefix
    assert cost.dense_macs == expected
    assert cost.head_macs == 10 * width
    assert cost.macs == expected + 12 * (2 * (patches + prefix) * width * 8 + patches * width)


def expected_macs(variant, output, *, prefix=1, patches=16, width=32, hidden=128, depth=3, bottleneck=8, batch):
    """MACs of a batch of a tiny host, with the active tokens that its gates report; without embedding and head."""
    active = {gate.unit: (gate.values.sum(1) + prefix).tolist() for gate in output.gates}
    tokens = patches + prefix
    total = 0.0
    for image in range(batch):
        for block in range(depth):
            layer = active.get(f"blocks.{block}")
            attn, mlp = (active.get(f"blocks.{block}.{kind}", layer) for kind in ("attn", "mlp"))
            k = attn[image] if attn else tokens
            total += 4 * k * width**2 + 2 * k**2 * width + 5 * k * width
            k = mlp[image] if mlp else tokens
            total += 2 * k * width * hidden + 5 * k * width
            places = 2 if variant == "attn-mlp" else 1
            total += places * (2 * tokens * width * bottleneck + patches * width)
    return total


def outside(batch, *, patches=16, tokens=17, width=32, classes=5):
    return batch * (patches * 8 * 8 * 3 * width + 5 * tokens * width + width * classes)


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "grad"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, 4])
def test_counter_sees_what_ran(make_host, randomise, images_for, variant, mode, batch):
    model = randomise(dyntune.tune(make_host(), f"dyt:surrogate=none,dispatch={variant}"), 1).eval()
    images = images_for(model.backbone.host, batch)
    context = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode, "grad": torch.enable_grad}[mode]
    with context(), MacCounter() as counter:
        output = model.run(images)
    expected = outside(batch) + expected_macs(variant, output, batch=batch)
    assert counter.macs == expected
    with context(), MacCounter() as counter:
        output = model.run(images, complete=True)
    dispatchers = 16 * 32 * (6 if variant == "attn-mlp" else 3)
    assert counter.macs == outside(batch) + expected_macs(variant, output, batch=batch) - batch * dispatchers
    assert counter.macs > expected


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_counter_under_bfloat16_autocast(make_host, randomise, images_for, variant):
    model = randomise(dyntune.tune(make_host(), f"dyt:surrogate=none,dispatch={variant}"), 1).eval()
    with MacCounter() as counter, torch.autocast("cpu", torch.bfloat16):
        output = model.run(images_for(model.backbone.host, 3))
    assert counter.macs == outside(3) + expected_macs(variant, output, batch=3)


@pytest.mark.parametrize("fused", [True, False])
@torch.no_grad()
def test_counter_sees_attention_of_the_pooling_head(make_host, images_for, fused):
    set_fused_attn(fused)
    try:
        host = make_host("siglip")
    finally:
        set_fused_attn(True)
    assert host.attn_pool.fused_attn is fused
    pool = 2 * 32**2 + 2 * 16 * 32**2 + 2 * 16 * 32 + 5 * 32 + 2 * 32 * 128
    expected = 16 * 192 * 32 + dense(3, 16, 32, 128) + 5 * 16 * 32 + pool
    plain = copy.deepcopy(host)
    model = dyntune.tune(host, "linear").eval()
    assert model.dense_macs == expected
    for run in (model, plain):
        with MacCounter() as counter:
            run(images_for(host, 2))
        assert counter.macs == 2 * (expected + 32 * 5)


@torch.no_grad()
def test_counter_sees_the_hosts_own_forward_whatever_its_attention(images_for, make_host):
    counts = []
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            host = make_host()
        finally:
            set_fused_attn(True)
        assert host.blocks[0].attn.fused_attn is fused
        with MacCounter() as counter:
            host(images_for(host, 2))
        counts.append(counter.macs)
    assert counts == [outside(2) + 2 * dense(3, 17, 32, 128)] * 2


@pytest.mark.parametrize("variant", VARIANTS)
def test_masked_training_computes_every_token(make_host, randomise, images_for, variant):
    model = randomise(dyntune.tune(make_host(), f"dyt:surrogate=none,dispatch={variant},explore=none"), 1).train()
    with MacCounter() as counter:
        model(images_for(model.backbone.host, 2))
    dispatchers = 16 * 32 * (6 if variant == "attn-mlp" else 3)
    adapters = 2 * 17 * 32 * 8 * (6 if variant == "attn-mlp" else 3)
    assert counter.macs == outside(2) + 2 * (dense(3, 17, 32, 128) + dispatchers + adapters)


def test_dense_count_of_every_host_is_that_of_its_own_forward(make_host, images_for, any_host_name):
    host = make_host(any_host_name)
    with torch.no_grad(), MacCounter() as counter:
        host(images_for(host, 1))
    model = dyntune.tune(host, "linear")
    cost = dyntune.cost(model)
    assert cost.head_macs == 32 * 5 * (2 if any_host_name == "distilled" else 1)
    assert cost.macs == model.dense_macs == counter.macs - cost.head_macs


class _OnGrid(nn.Module):
    """A convolution over the patches' features, as heads of dense tasks have one."""

    def __init__(self, width, classes):
        super().__init__()
        self.conv = nn.Conv2d(width, classes, 3, padding=1)

    def forward(self, x):
        return self.conv(x[:, 1:].mT.unflatten(2, (4, 4))).flatten(2).mean(2)


HEADS = {
    "every token": (None, 17 * 32 * 5),
    "of one's own": (nn.Sequential(nn.Dropout(0.1), nn.Linear(32, 7), nn.GELU(), nn.Linear(7, 5)), 17 * (32 * 7 + 35)),
    "convolution": (_OnGrid(32, 5), 16 * 9 * 32 * 5),
    "norm and map": (nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 5)), 17 * (5 * 32 + 32 * 5)),
}


@pytest.mark.parametrize("policy", [(), ("tome:r=2",), ("dispatch",)], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_heads_are_counted_as_they_run(make_host, images_for, name, policy):
    """``global_pool=""`` gives them every token; what is left is the same whatever the head."""
    head, macs = HEADS[name]
    host = make_host(global_pool="")
    host.head = copy.deepcopy(head) or host.head
    model = dyntune.tune(host, "linear", *policy).eval()
    cost = dyntune.cost(model)
    assert cost.head_macs == macs
    pooled = dyntune.cost(dyntune.tune(make_host(), "linear", *policy))
    assert (cost.macs, cost.norm_macs) == (pooled.macs, pooled.norm_macs)
    assert model.dense_macs == dyntune.tune(make_host(), "linear").dense_macs
    images = images_for(host, 2)
    with MacCounter() as counter, torch.no_grad(), counter.watching(model.backbone):
        model(images)
    assert counter.head_macs == 2 * macs
    labels = torch.zeros(2, dtype=torch.long) if name == "convolution" else torch.zeros(2, 5, dtype=torch.long)
    if policy != ("dispatch",):
        assert evaluate(model, [(images, labels)], metric=_Nothing(1)).macs == cost.macs


class Cosine(nn.Module):
    """A head of no linear map: cosines to a prototype of each class; several things at once, where they are asked."""

    def __init__(self, classes, also=False):
        super().__init__()
        self.prototypes, self.also = nn.Parameter(torch.ones(classes, 32)), also

    def forward(self, x):
        logits = F.normalize(x, dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        return (logits, x) if self.also else logits


def test_a_head_without_a_linear_map_has_the_outputs_that_it_gives(make_host, images_for):
    host = make_host()
    host.head = Cosine(7)
    model = dyntune.tune(host, "lora")
    assert model.backbone.classes == 7 and dyntune.cost(model).head_macs == 32 * 7
    with pytest.raises(DataError, match=r"is 7\. Expected a single whole number from 0 to 6"):
        evaluate(model, TensorDataset(images_for(host, 2), torch.tensor([0, 7])))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        (nn.Linear(31, 5), "cannot compute an input of the shape"),
        (nn.LazyLinear(5), "lazy layers have run once"),
        (Cosine(5, also=True), "head gives a tuple. Expected one tensor"),
    ],
)
def test_a_head_that_does_not_fit_is_refused(make_host, head, words):
    host = make_host()
    host.head = head
    with pytest.raises(BackboneError, match=words):
        dyntune.tune(host, "lora")


class _Nothing(Metric):
    def update(self, outputs, targets):
        pass

    def figures(self):
        return {}


@pytest.mark.parametrize("name", ["plain", "siglip"])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cost_at_any_rate(make_host, name, variant, rate):
    """Fractional numbers of active patches count as the line between the whole numbers around them."""
    prefix = 1 if name == "plain" else 0
    model = dyntune.tune(make_host(name), f"dispatch:surrogate=none,where={variant},rate={rate}")
    low = int(rate * 16 + 1e-9)
    part = rate * 16 - low

    def at(patches, attended, other):
        k, j = (patches if attended else 16) + prefix, (patches if other else 16) + prefix
        return 4 * k * 32**2 + 2 * k**2 * 32 + 5 * k * 32 + 2 * j * 32 * 128 + 5 * j * 32

    gated = (variant != "mlp", variant != "attn")
    saved = at(16, True, True) - ((1 - part) * at(low, *gated) + part * at(low + 1, *gated))
    gates = 2 if variant == "attn-mlp" else 1
    expected = model.dense_macs - 3 * saved + 3 * gates * 16 * 32
    assert dyntune.cost(model).macs == pytest.approx(expected, abs=1)


def test_cost_leaves_the_model_as_it_was(make_host, images_for):
    model = dyntune.tune(make_host("registers"), "dyt").train()
    model.backbone.host.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = {name: (p, p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    cost = dyntune.cost(model)
    assert torch.equal(state, torch.get_rng_state())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2
    for name, parameter in model.named_parameters():
        same, value, grad = weights[name]
        assert parameter is same
        assert torch.equal(parameter, value)
        assert parameter.requires_grad is grad
        assert parameter.grad is None
    assert dyntune.cost(model.eval()) == cost


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cost_of_a_model_in_another_precision(make_host, dtype):
    model = dyntune.tune(make_host(), "dyt")
    expected = dyntune.cost(model)
    cost = dyntune.cost(model.to(dtype))
    assert cost.macs == expected.macs
    surrogates = 2 * 3 * (2 * 32 + 32 + 1)  # in bf16 whatever the model is in
    assert cost.adapter_bytes == (expected.adapter_bytes - surrogates) * dtype.itemsize // 4 + surrogates


def test_counter_adds_products_and_convolutions():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with MacCounter() as counter:
        a @ b
        torch.einsum("ij,jk->ik", a, b)
        torch.relu(a) + a * 2
        torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(6, 3, 4, 4), stride=4)
        torch.nn.functional.layer_norm(a, (4,), torch.ones(4), torch.ones(4))
    assert counter.macs == 60 + 60 + 2 * 4 * 6 * 48 + 5 * 12


# Giga-MACs of ViT-B/16 with 100 classes, head included, without what deciding about tokens takes.
CONSTANT = (14.780, 14.224, 13.670, 13.117, 12.566, 12.017, 11.469, 10.922, 10.377, 9.834, 9.292, 8.781)
TOME = dict(zip(map(str, range(5, 17)), CONSTANT, strict=True))
EVIT = {
    "true": {0.9: 15.411, 0.8: 13.340, 0.7: 11.622, 0.6: 10.098, 0.5: 8.828},
    "false": {0.9: 15.283, 0.8: 13.214, 0.7: 11.497, 0.6: 9.994, 0.5: 8.725},
}
# The same with what deciding takes: the published code's matching, and the predictors.
FALLING = {"8,inflect=-1": 11.768, "16,inflect=-1": 5.871}
DYNAMICVIT = {"0.9/0.7/0.5": 14.050, "0.9/0.81/0.729": 15.530, "0.8/0.64/0.512": 13.338, "0.7/0.49/0.343": 11.489}
HEAD = 76_800


@pytest.fixture(scope="module")
def traced():
    """``traced(spec)`` is what a policy makes of ViT-B/16."""
    host = on_meta("vit_base_patch16_224", num_classes=100)

    def with_policy(spec):
        backbone, (policy,) = wrap(host), resolve([spec])
        policy = policy.from_strings({}) if isinstance(policy, type) else policy
        with shapes_only():
            policy.install(backbone)
        return trace(backbone, (policy,))

    return with_policy


def of_vit_b(attention, mlp):
    """MACs of ViT-B/16 with so many tokens in the attention and in the MLP of each block, without head."""
    total = 196 * 768 * 768 + 5 * mlp[-1] * 768
    for n, m in zip(attention, mlp, strict=True):
        total += 4 * n * 768**2 + 2 * n**2 * 768 + 5 * n * 768 + m * (8 * 768**2 + 5 * 768)
    return total


def matching(tokens, *, prefix):
    """MACs of ToMe's matching in a block that merges some of so many tokens, of which the prefix is left out."""
    return (tokens - prefix) // 2 * ceil((tokens - prefix) / 2) * 64


@pytest.mark.parametrize("r", TOME | FALLING)
def test_tome_on_vit_b(traced, r):
    """The published code matches the class token too, which changes the fifth digit."""
    found = traced(f"tome:r={r}")
    merging = [n for n, m in zip(found.attention_tokens, found.mlp_tokens, strict=True) if n > m]
    plain = of_vit_b(found.attention_tokens, found.mlp_tokens)
    assert found.macs == plain + sum(matching(n, prefix=1) for n in merging)
    if r in TOME:
        assert (plain + HEAD) / 1e9 == pytest.approx(TOME[r], abs=5.1e-4)
        assert found.mlp_tokens[:10] == tuple(197 - int(r) * (block + 1) for block in range(10))
    else:
        as_published = plain + sum(matching(n, prefix=0) for n in merging) + HEAD
        assert as_published / 1e9 == pytest.approx(FALLING[r], abs=5.1e-4)
    assert found.attention_tokens == (197, *found.mlp_tokens[:-1])
    if r == "8":
        assert f"{(plain + HEAD) / 1e9:.4f}" == "13.1174"
        assert f"{(plain + HEAD + sum(matching(n, prefix=0) for n in merging)) / 1e9:.4f}" == "13.1220"
        assert f"{(found.macs + HEAD) / 1e9:.4f}" == "13.1219"


@pytest.mark.parametrize("fuse", EVIT)
@pytest.mark.parametrize("keep", EVIT["true"])
def test_evit_on_vit_b(traced, fuse, keep):
    found = traced(f"evit:keep={keep},fuse={fuse}")
    ranking = sum(found.attention_tokens[block] for block in (3, 6, 9)) * 768
    assert found.macs == of_vit_b(found.attention_tokens, found.mlp_tokens) + ranking
    assert (found.macs + HEAD - ranking) / 1e9 == pytest.approx(EVIT[fuse][keep], abs=5.1e-4)
    if keep == 0.7:
        first, second, third = (140, 100, 72) if fuse == "true" else (139, 98, 69)
        assert found.attention_tokens == (197,) * 4 + (first,) * 3 + (second,) * 3 + (third,) * 2
        assert found.mlp_tokens == (197,) * 3 + (first,) * 3 + (second,) * 3 + (third,) * 3


@pytest.mark.parametrize("keep", DYNAMICVIT)
def test_dynamicvit_on_vit_b(traced, keep):
    found = traced(f"dynamicvit:keep={keep}")
    assert found.attention_tokens == found.mlp_tokens
    seen = sum(found.mlp_tokens[block] - 1 for block in (2, 5, 8))
    predictors = seen * (768**2 + 768**2 // 2 + 768**2 // 8 + 768 // 2 + 5 * 768)
    assert found.macs == of_vit_b(found.attention_tokens, found.mlp_tokens) + predictors
    assert (found.macs + HEAD) / 1e9 == pytest.approx(DYNAMICVIT[keep], abs=5.1e-4)
    if keep == "0.9/0.7/0.5":
        assert found.mlp_tokens == (197,) * 3 + (177,) * 3 + (138,) * 3 + (99,) * 3


TINY = {
    "dyt": ([17] * 3, [17] * 3),
    "dyt:rate=0.33,dispatch=attn-mlp": ([17] * 3, [17] * 3),
    "dyt:rate=0.33,dispatch=layer": ([17] * 3, [17] * 3),
    "vpt:prompts=4": ([21] * 3, [21] * 3),
    "vpt:prompts=4+tome:r=3": ([21, 18, 15], [18, 15, 12]),
    "vpt:prompts=4,deep=false+tome:r=3": ([21, 18, 15], [18, 15, 12]),
    "dyt:rate=0.3+tome:r=3": ([17, 14, 11], [14, 11, 8]),
    "adaptformer+evit:layers=1": ([17, 17, 14], [17, 14, 14]),
    "lora+dynamicvit:keep=0.6,layers=1": ([17, 10, 10], [17, 10, 10]),
    "dyt:rate=0.3+dynamicvit:keep=0.6,layers=0": ([10] * 3, [10] * 3),
    "res-tuning-bypass": ([17] * 3, [17] * 3),
    "ssf": ([17] * 3, [17] * 3),
}


@pytest.mark.parametrize("spec", TINY)
def test_blocks_and_what_is_around_them_make_the_whole(make_host, spec):
    model = dyntune.tune(make_host(), *spec.split("+"))
    cost = dyntune.cost(model)
    assert cost.embedding_macs == 16 * 192 * 32
    assert cost.embedding_macs + sum(block.macs for block in cost.blocks) + cost.norm_macs == cost.macs
    assert [block.block for block in cost.blocks] == ["blocks.0", "blocks.1", "blocks.2"]
    assert {block.dense_macs for block in cost.blocks} == {dense(1, 17, 32, 128)}
    attention, mlp = TINY[spec]
    assert [block.attention_tokens for block in cost.blocks] == attention
    assert [block.mlp_tokens for block in cost.blocks] == mlp
    assert cost.norm_macs == 5 * 32 * mlp[-1]
    assert json.loads(json.dumps(cost.to_dict()))["blocks"][0]["mlp_tokens"] == mlp[0]


@pytest.mark.parametrize("spec", TINY)
def test_cost_is_that_of_inference_in_train_mode_too(make_host, spec):
    model = dyntune.tune(make_host(), *spec.split("+"))
    assert dyntune.cost(model.train()) == dyntune.cost(model.eval())


def test_parts_around_the_blocks_of_every_host(make_host, any_host_name):
    cost = dyntune.cost(dyntune.tune(make_host(any_host_name), "linear"))
    assert cost.embedding_macs + sum(block.macs for block in cost.blocks) + cost.norm_macs == cost.macs
    assert all(block.macs == block.dense_macs for block in cost.blocks)
    assert cost.norm_macs >= 5 * 32


@pytest.mark.parametrize(
    "spec,attention,mlp",
    [
        ("dyt:rate=0.5,dispatch=mlp", 21, 13),
        ("dyt:rate=0.7,dispatch=attn", 16.2, 21),
        ("dyt:rate=0.7,dispatch=attn-mlp", 16.2, 16.2),
        ("dyt:rate=0.7,dispatch=layer", 16.2, 16.2),
        ("dyt:rate=0,dispatch=layer", 5, 5),
        ("adaptformer", 21, 21),
    ],
)
def test_expected_tokens_of_gates(make_host, spec, attention, mlp):
    cost = dyntune.cost(dyntune.tune(make_host("registers"), spec))
    assert {(block.attention_active, block.mlp_active) for block in cost.blocks} == {(attention, mlp)}
    assert {(block.attention_tokens, block.mlp_tokens) for block in cost.blocks} == {(21, 21)}


def test_expected_tokens_of_gates_among_merged_ones(make_host):
    cost = dyntune.cost(dyntune.tune(make_host(), "dyt:rate=0.5", "tome:r=3"))
    assert [block.mlp_active for block in cost.blocks] == [1 + 13 / 2, 1 + 10 / 2, 1 + 7 / 2]
    assert [block.attention_active for block in cost.blocks] == [17, 14, 11]


class LargestStorage(TorchDispatchMode):
    """Notes the largest storage that an operator returns and has not been given."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
        return result


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "siglip", "qk_norm", "swiglu_packed"])
@pytest.mark.parametrize("spec", ["linear", "adaptformer", "tome:r=4", "vpt:prompts=3", "dyt:rate=1"])
def test_largest_activation_is_that_of_a_pass_on_an_image(make_host, images_for, name, spec):
    model = dyntune.tune(make_host(name), *(("linear", spec) if "tome" in spec else (spec,))).eval()
    if "dyt" in spec:
        for block in model.backbone.blocks:
            block.mlp.dispatcher.gate.bias.fill_(100)
    images = images_for(model.backbone.host, 1)
    with LargestStorage() as watch:
        model(images)
    assert dyntune.cost(model).largest_activation_bytes == watch.largest


def test_largest_activation_says_where_it_is_made(make_host):
    plain = dyntune.cost(dyntune.tune(make_host(), "linear"))
    assert plain.largest_activation_bytes == 17 * 128 * 4  # smaller than the MLP's weights
    assert (plain.largest_activation_shape, plain.largest_activation_at) == ((17, 128), "blocks.0")
    pruned = dyntune.cost(dyntune.tune(make_host(), "linear", "tome:r=8"))
    assert pruned.largest_activation_bytes == 17 * 96 * 4
    shallow = dyntune.cost(dyntune.tune(make_host(img_size=64, mlp_ratio=0.5, embed_dim=64), "full", "tome:r=0/0/8"))
    assert shallow.largest_activation_at == "blocks.0"
    grown = dyntune.cost(dyntune.tune(make_host(), "vpt:prompts=4"))
    assert grown.largest_activation_bytes == 21 * 128 * 4
    half = dyntune.cost(dyntune.tune(make_host(), "linear").to(torch.bfloat16))
    assert half.largest_activation_bytes == 17 * 128 * 2


@pytest.mark.parametrize("name", ["plain", "siglip"])
def test_fused_attention_makes_no_matrix(make_host, name):
    """With 1024 patches a matrix of queries by keys, 4 x 1024 x 1024, would be the largest tensor by far."""
    prefix = 1 if name == "plain" else 0
    host = {"img_size": 256, "depth": 2}
    cost = dyntune.cost(dyntune.tune(make_host(name, **host), "linear"))
    assert cost.largest_activation_bytes == (1024 + prefix) * 128 * 4
    cost = dyntune.cost(dyntune.tune(make_host(name, **host), "linear", "tome:r=1"))
    assert cost.largest_activation_shape == (1, 512, 512)  # ToMe's own matching of even with odd patches


@pytest.mark.parametrize(
    ("call", "shapes"),
    [
        (F.linear, [(2, 5, 6), (7, 6), (7,)]),
        (lambda x: F.gelu(x.transpose(1, 2)), [(2, 5, 6)]),
        (lambda x: F.gelu(x, approximate="tanh"), [(5, 6)]),
        (lambda x: F.layer_norm(x, (5, 6)), [(2, 5, 6)]),
        (lambda x, weight: F.layer_norm(x.mT, (5,), weight), [(2, 5, 6), (5,)]),
        (F.scaled_dot_product_attention, [(3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 6)]),
        (F.scaled_dot_product_attention, [(1, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 4)]),
        (partial(F.scaled_dot_product_attention, enable_gqa=True), [(3, 4, 5, 6), (3, 2, 7, 6), (3, 2, 7, 6)]),
        (lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask), [(5, 4), (7, 4), (7, 4), (5, 7)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_tracing_makes_of_an_operator_is_what_it_gives(call, shapes, dtype):
    """Layer norms, products, GELU and attention are not asked on the meta device, where PyTorch answers slowly."""
    with torch.no_grad(), MacCounter() as counter:
        expected = call(*(torch.randn(shape, dtype=dtype) for shape in shapes))
    with torch.no_grad(), Watch() as watch, FusedAttention(watch):
        found = call(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert watch.macs == counter.macs
    if call is not F.scaled_dot_product_attention:  # whose strides depend on the kernel
        assert found.stride() == expected.stride()
