"""Dispatch against the equations of DyT, written out in plain tensor operations."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.parts.policies.dispatch import Dispatch
from dyntune.parts.policies.dispatcher import Dispatcher

VARIANTS = ("mlp", "attn", "attn-mlp", "layer")
ORDERS = ("dispatch:where=layer+moe-adapter:where=mlp", "moe-adapter:where=mlp+dispatch:where=layer")


def attention(block, x, active):
    """Update of the attention sub-layer for one image ``(N, C)``; only ``active`` tokens take part, others get 0."""
    out = torch.zeros_like(x)
    picked = x[active]
    width = picked.shape[1]
    heads = block.attn.num_heads
    normed = F.layer_norm(picked, (width,), block.norm1.weight, block.norm1.bias, block.norm1.eps)
    q, k, v = (normed @ block.attn.qkv.weight.T + block.attn.qkv.bias).chunk(3, dim=-1)
    joined = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        scores = q[:, part] @ k[:, part].T / (width // heads) ** 0.5
        joined.append(torch.softmax(scores, dim=-1) @ v[:, part])
    attended = torch.cat(joined, dim=-1) @ block.attn.proj.weight.T + block.attn.proj.bias
    out[active] = attended * gamma(block.ls1)
    return out


def mlp(block, x):
    hidden = F.layer_norm(x, x.shape[-1:], block.norm2.weight, block.norm2.bias, block.norm2.eps)
    hidden = F.gelu(hidden @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return (hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias) * gamma(block.ls2)


def gamma(layer_scale):
    return getattr(layer_scale, "gamma", 1.0)


def adapter(unit, x):
    weights = unit.parallel["adapter"]
    hidden = F.relu(x @ weights.down_proj.weight.T + weights.down_proj.bias)
    return weights.scale * (hidden @ weights.up_proj.weight.T + weights.up_proj.bias)


def stand_in(unit, x, active):
    """What skipped tokens get instead of the unit's update: U (V x + c) + b, zeros at the others."""
    down, shift, up, bias = (getattr(unit.surrogate, name).float() for name in ("down", "shift", "up", "bias"))
    return ~active[:, None] * ((x @ down.T + shift) @ up.T + bias)


def decide(unit, x, prefix):
    gate = unit.dispatcher.gate
    logits = x @ gate.weight[0] + gate.bias[0]
    return torch.cat([torch.ones(prefix, dtype=torch.bool), logits[prefix:] > 0])


def straight_line(model, image, variant):
    """Logits and masks of one image under methods 16 and 17 (active tokens attend to active tokens)."""
    host = model.backbone.host
    x = F.conv2d(image[None], host.patch_embed.proj.weight, host.patch_embed.proj.bias, stride=8)[0].flatten(1).T
    prefix = [host.cls_token[0]] + ([host.reg_token[0]] if host.reg_token is not None else [])
    x = (
        torch.cat([*prefix, x + host.pos_embed[0]])
        if host.no_embed_class
        else torch.cat([*prefix, x]) + host.pos_embed[0]
    )
    prefix = host.num_prefix_tokens
    everything = torch.ones(len(x), dtype=torch.bool)
    masks = []
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        if variant == "layer":
            active = decide(unit, x, prefix)
            attended = attention(block, x, active)
            own = active[:, None] * (attended + mlp(block, x + attended))
            x = x + own + adapter(unit, x) + stand_in(unit, x, active)
            masks.append(active)
            continue
        if variant in ("attn", "attn-mlp"):
            active = decide(unit.attn, x, prefix)
            x = x + attention(block, x, active) + adapter(unit.attn, x) + stand_in(unit.attn, x, active)
            masks.append(active)
        else:
            x = x + attention(block, x, everything)
        if variant in ("mlp", "attn-mlp"):
            active = decide(unit.mlp, x, prefix)
            x = x + active[:, None] * mlp(block, x) + adapter(unit.mlp, x) + stand_in(unit.mlp, x, active)
            masks.append(active)
        else:
            x = x + mlp(block, x)
    x = F.layer_norm(x, x.shape[-1:], host.norm.weight, host.norm.bias, host.norm.eps)
    return x[0] @ host.head.weight.T + host.head.bias, masks


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", ["plain", "registers"])
@torch.no_grad()
def test_logits_and_masks_are_those_of_the_written_out_block(make_host, randomise, images_for, name, variant):
    model = randomise(dyntune.tune(make_host(name), f"dyt:dispatch={variant},scale=0.7"), seed=3).eval()
    images = images_for(model.backbone.host, 4)
    output = model.run(images)
    expected = [straight_line(model, image, variant) for image in images]
    assert len(output.gates) == len(expected[0][1]) == (6 if variant == "attn-mlp" else 3)
    prefix = model.backbone.host.num_prefix_tokens
    for index, gate in enumerate(output.gates):
        torch.testing.assert_close(gate.values.bool(), torch.stack([masks[index][prefix:] for _, masks in expected]))
    active = torch.stack([gate.values for gate in output.gates])
    assert 0 < active.mean() < 1
    torch.testing.assert_close(output.logits, torch.stack([logits for logits, _ in expected]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_and_gates_recorded_from_the_public_code(recorded):
    host = recorded.host()
    assert host.blocks[0].attn.qkv.weight[0, :4].tolist() == pytest.approx(
        [0.22381, 0.224474, 0.028266, -0.148139], abs=1e-6
    )
    model = dyntune.tune(host, "dyt:bottleneck=8,scale=0.1").eval()
    names = {r"\.mlp\.parallel\.adapter\.": ".adaptmlp.", r"\.mlp\.dispatcher\.gate\.": ".mlp_token_select.mlp_head."}
    recorded.fill(model.backbone.blocks, "blocks.", names)
    assert model.run(recorded.images, complete=True).gates == ()
    for execution in ("masked", "compact"):
        output = model.run(recorded.images, execution=execution)
        recorded.check(output.logits, ".7241 .6888 -.8221 -1.6897 .6172 | .8716 .7175 -.9255 | 21.0246")
        shares = [gate.values[0].mean().item() for gate in output.gates]
        published = [0.459, 0.597, 0.526, 0.939, 0.138, 0.219, 0.638, 0.051, 0.020, 0.056, 0, 0.985]
        assert shares == pytest.approx(published, abs=5e-4)
    for image, expected in zip(recorded.images, output.logits, strict=True):
        torch.testing.assert_close(model(image[None])[0], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_logits_of_the_dense_model_are_those_recorded(recorded):
    logits = dyntune.tune(recorded.host(), "linear").eval()(recorded.images)
    recorded.check(logits, ".4322 .6317 -.9800 -2.0359 .4140 | .4731 .5311 -1.2391 | 22.3676")


def linear_gate(weight, bias=0.0, temperature=5.0):
    gate = Dispatcher(len(weight), temperature)
    with torch.no_grad():
        gate.gate.weight.copy_(torch.tensor([weight]))
        gate.gate.bias.fill_(bias)
    return gate


def test_inference_is_active_strictly_above_zero():
    gate = linear_gate([1.0]).eval()
    logits = torch.tensor([[-3.0, -1e-7, 0.0, 1e-7, 3.0]]).unsqueeze(-1)
    assert gate(logits).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0]]
    assert linear_gate([0.0], bias=0.0).eval()(logits).sum() == 0


def test_inference_draws_no_noise():
    gate = Dispatcher(4, 5.0).eval()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    gate(torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("temperature", [0.1, 5.0, 50.0])
def test_training_is_active_with_the_probability_of_the_sigmoid(temperature):
    gate = linear_gate([1.0], temperature=temperature).train()
    torch.manual_seed(7)
    samples = 40_000
    for logit in (-2.0, -0.5, 0.0, 1.5):
        share = gate(torch.full((1, samples, 1), logit)).mean().item()
        expected = torch.sigmoid(torch.tensor(logit)).item()
        deviation = (expected * (1 - expected) / samples) ** 0.5
        assert abs(share - expected) < 4 * deviation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_values_are_exactly_zero_or_one(dtype):
    gate = linear_gate([1.0], temperature=0.7).train().to(dtype)
    torch.manual_seed(0)
    values = gate(torch.randn(8, 4000, 1, dtype=dtype) * 3)
    assert values.dtype is dtype
    assert set(values.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize("temperature", [0.5, 5.0])
def test_gradient_is_that_of_the_tempered_sigmoid_at_the_drawn_noise(temperature):
    gate = linear_gate([0.3, -0.8, 0.5], bias=0.1, temperature=temperature).train()
    patches = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    upstream = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(11)
    mask = gate(patches)
    mask.backward(upstream)

    torch.manual_seed(11)
    first = -torch.empty(4, 6).exponential_().log()
    second = -torch.empty(4, 6).exponential_().log()
    logits = patches @ torch.tensor([0.3, -0.8, 0.5]) + 0.1
    soft = torch.sigmoid((logits + first - second) / temperature)
    torch.testing.assert_close(mask.detach(), (logits + first - second > 0).float())
    by_logit = upstream * soft * (1 - soft) / temperature
    torch.testing.assert_close(gate.gate.bias.grad, by_logit.sum()[None])
    torch.testing.assert_close(gate.gate.weight.grad[0], torch.einsum("bp,bpc->c", by_logit, patches))


@pytest.mark.parametrize("name", ["plain", "registers", "siglip"])
@pytest.mark.parametrize("variant", ["attn-mlp", "layer"])
@torch.no_grad()
def test_prefix_tokens_are_computed_when_no_patch_is_active(make_host, randomise, images_for, name, variant):
    """With every patch skipped, prefix tokens see each other only: patches keep their value, whatever it is."""
    model = randomise(dyntune.tune(make_host(name), f"dispatch:where={variant},surrogate=none"), seed=1).eval()
    for unit in model.backbone.units(variant):
        unit.dispatcher.gate.weight.zero_()
        unit.dispatcher.gate.bias.fill_(-1.0)
    host = model.backbone.host
    tokens = model.backbone.embed(images_for(host, 2))
    prefix = host.num_prefix_tokens
    seen = []
    handle = host.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    output = model.run(images_for(host, 2))
    handle.remove()
    assert all(gate.values.shape == (2, 16) and gate.values.sum() == 0 for gate in output.gates)
    torch.testing.assert_close(seen[0][:, prefix:], tokens.x[:, prefix:], atol=0, rtol=0)
    expected = tokens.x[:, :prefix]
    for block in host.blocks if prefix else ():
        expected = block(expected)
    torch.testing.assert_close(seen[0][:, :prefix], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("first,second", list(product(VARIANTS, VARIANTS)))
def test_no_unit_is_gated_twice(make_host, first, second):
    spec = f"dispatch:where={first}+dispatch:where={second}"
    if {first, second} == {"mlp", "attn"}:
        model = dyntune.tune(make_host(), spec)
        units = [gate.unit for gate in model.run(torch.zeros(1, 3, 32, 32)).gates]
        assert units == [f"blocks.{i}.{kind}" for i in range(3) for kind in ("attn", "mlp")]
    else:
        with pytest.raises(BackboneError, match="several gates at the same time"):
            dyntune.tune(make_host(), spec)


@pytest.mark.parametrize("spec", ORDERS)
def test_module_that_looks_at_all_tokens_is_refused_inside_a_gated_layer(make_host, spec):
    with pytest.raises(BackboneError, match="all tokens"):
        dyntune.tune(make_host(), spec)


@torch.no_grad()
def test_module_that_looks_at_all_tokens_may_stand_beside_a_gated_layer(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "dyt:dispatch=layer,experts=2"), seed=2).eval()
    images = images_for(model.backbone.host, 3)
    torch.testing.assert_close(
        model.run(images, execution="compact").logits,
        model.run(images, execution="masked").logits,
        atol=1e-5,
        rtol=1e-5,
    )


def test_size_of_the_dispatchers(make_host):
    model = dyntune.tune(make_host(), "dispatch:where=attn-mlp")
    assert dyntune.cost(model).trainable_params == 6 * (32 + 1)


def test_fresh_dispatchers_have_small_weights_and_no_bias():
    torch.manual_seed(0)
    gate = Dispatcher(4096, 5.0).gate
    assert gate.bias.item() == 0
    assert gate.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    "options", [{"rate": -0.1}, {"rate": 1.1}, {"temperature": 0.0}, {"rate_weight": -1.0}, {"distill_weight": -0.1}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="dispatch: expected"):
        Dispatch(**options)


def test_the_rate_loss_can_hold_the_activation_of_inference(make_host, randomise, images_for):
    """Noise makes gates with logits near 0 a coin toss; without it they are all open, which is what inference does."""
    model = dyntune.tune(make_host(), "dispatch:rate=0.5,rate_weight=2,complete_weight=0,distill_weight=0").train()
    with torch.no_grad():
        for block in model.backbone.blocks:
            block.mlp.dispatcher.gate.weight.zero_()
            block.mlp.dispatcher.gate.bias.fill_(0.01)
    images = images_for(model.backbone.host, 2)
    loss = dyntune.training_loss(model, images, torch.tensor([0, 1]))
    assert loss.terms["rate"].item() == pytest.approx(2 * (1.0 - 0.5) ** 2)
    loss.terms["rate"].backward()
    # d/db of 2 (m - r)^2 through the straight-through sigmoid: 4 (m - r) S(1 - S) / tau, a third per block
    soft = torch.sigmoid(torch.tensor(0.01 / 5))
    expected = 4 * 0.5 * soft * (1 - soft) / 5 / 3
    for block in model.backbone.blocks:
        torch.testing.assert_close(block.mlp.dispatcher.gate.bias.grad, expected[None])


@torch.no_grad()
@pytest.mark.parametrize("spec", ["dispatch", "dispatch:bias=3", "dyt", "dyt:gate_bias=3"])
def test_gates_start_open_unless_they_are_the_published_ones(make_host, images_for, spec):
    torch.manual_seed(0)
    host = make_host()
    images = images_for(host, 4)
    assert all(gate.values.mean() == 1 for gate in dyntune.tune(host, spec).eval().run(images).gates)
    rates = [
        gate.values.mean()
        for gate in dyntune.tune(make_host(), f"{spec.split(':')[0]}:recipe=published").eval().run(images).gates
    ]
    assert 0.1 < sum(rates) / len(rates) < 0.9
