"""Counts against the published tables and against closed forms at the numbers of tokens that really ran."""

import pytest
import timm
import torch
from timm.layers import set_fused_attn
from timm.models.vision_transformer import VisionTransformer

import dyntune
from dyntune.cost import MacCounter

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
    with torch.device("meta"):
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
        macs, params = small_vit_b(f"dyt:dispatch={variant},bottleneck={bottleneck},rate={rate}")
        assert macs / 1e9 == pytest.approx(published, abs=6e-4)
        places = 24 if variant == "attn-mlp" else 12
        assert params == places * (2 * 768 * bottleneck + bottleneck + 768 + 769)


@pytest.mark.parametrize(
    "spec,macs,params",
    [
        ("linear", DENSE_VIT_B, 0),
        ("dyt:rate=1", 17_612_827_392, 165_996),
        ("dyt:rate=0.5", 12_059_247_360, 165_996),
        ("dyt:bottleneck=64,rate=1", 17_612_827_392 + 12 * 2 * 197 * 768 * 56, 1_198_860),
        ("dyt:bottleneck=64,experts=4,rate=1", None, 4_795_392 + 9_228),
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
    cost = dyntune.cost(dyntune.tune(on_meta(name, num_classes=10, **options), "dyt:rate=1"))
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
    model = randomise(dyntune.tune(make_host(), f"dyt:dispatch={variant}"), 1).eval()
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
    model = randomise(dyntune.tune(make_host(), f"dyt:dispatch={variant}"), 1).eval()
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
    model = dyntune.tune(host, "linear").eval()
    assert model.dense_macs == expected
    for run in (model, host):
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
    model = randomise(dyntune.tune(make_host(), f"dyt:dispatch={variant}"), 1).train()
    with MacCounter() as counter:
        model(images_for(model.backbone.host, 2))
    dispatchers = 16 * 32 * (6 if variant == "attn-mlp" else 3)
    adapters = 2 * 17 * 32 * 8 * (6 if variant == "attn-mlp" else 3)
    assert counter.macs == outside(2) + 2 * (dense(3, 17, 32, 128) + dispatchers + adapters)


def test_dense_count_of_every_host_is_that_of_its_own_forward(make_host, images_for, host_name):
    host = make_host(host_name)
    with torch.no_grad(), MacCounter() as counter:
        host(images_for(host, 1))
    model = dyntune.tune(host, "linear")
    cost = dyntune.cost(model)
    assert cost.head_macs == 32 * 5 * (2 if host_name == "distilled" else 1)
    assert cost.macs == model.dense_macs == counter.macs - cost.head_macs


@pytest.mark.parametrize("name", ["plain", "siglip"])
@pytest.mark.parametrize("rate", [0.0, 0.03, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cost_at_any_rate(make_host, name, variant, rate):
    """Fractional numbers of active patches count as the line between the whole numbers around them."""
    prefix = 1 if name == "plain" else 0
    model = dyntune.tune(make_host(name), f"dispatch:where={variant},rate={rate}")
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
    assert cost.adapter_bytes == expected.adapter_bytes * dtype.itemsize // 4


def test_counter_adds_products_and_convolutions():
    a, b = torch.ones(3, 4), torch.ones(4, 5)
    with MacCounter() as counter:
        a @ b
        torch.einsum("ij,jk->ik", a, b)
        torch.relu(a) + a * 2
        torch.nn.functional.conv2d(torch.ones(2, 3, 8, 8), torch.ones(6, 3, 4, 4), stride=4)
        torch.nn.functional.layer_norm(a, (4,), torch.ones(4), torch.ones(4))
    assert counter.macs == 60 + 60 + 2 * 4 * 6 * 48 + 5 * 12
