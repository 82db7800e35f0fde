"""PYRA against logits recorded from the public code, and against its steps written out for one image."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from written_out import attend, read_out

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.pyra import Pyra

HIGH = (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3)
RECORDED = {
    "pyra:r=low": (".2055 .5055 -.7096 -2.2223 .2835 | .6491 .1440 -1.5255 | 21.6151", 11),
    "pyra:r=high": (".1940 -.0893 -1.0771 -2.1066 .4671 | .3905 .4875 -1.4338 | 21.9558", 5),
}
NAMES = {r"\.mlp\.reducers\.pyra\.(a|b)$": r".pyra_\1", r"\.mlp\.reducers\.pyra\.norm\.": ".pyra_norm."}
HOSTS = ("plain", "deit3", "registers", "distilled", "average", "siglip", "qk_norm", "swiglu", "oblong", "clip")
LIST = "pyra:r=4/3/2"


def parameters(model, prefix=""):
    return {n: p for n, p in model.backbone.named_parameters() if ".reducers.pyra." in n and n.startswith(prefix)}


def merged(x, keys, sizes, prefix, reducer):
    """Tokens and sizes after the most similar pairs were merged, one after the other."""
    keys = keys / keys.norm(dim=-1, keepdim=True)
    into = [position for position in range(prefix, len(x)) if position % 2]
    pairs = []
    for position in range(prefix, len(x)):
        if position % 2 == 0:
            scores = [(keys[position] @ keys[other]).item() for other in into]
            best = max(range(len(into)), key=scores.__getitem__)
            pairs.append((scores[best], position, into[best]))
    pairs.sort(reverse=True)
    count = len(reducer.a)
    total, number = x * sizes[:, None], sizes.clone()
    sums = total.clone()
    sources = torch.stack([total[source] for _, source, _ in pairs[:count]])
    partners = torch.stack([total[partner] for _, _, partner in pairs[:count]])
    pooled = F.layer_norm(sources + partners, x.shape[-1:], reducer.norm.weight, reducer.norm.bias, 1e-5)
    by_channel = 2 * torch.sigmoid((reducer.a * pooled).sum(0))
    for row, (_, source, partner) in enumerate(pairs[:count]):
        by_pair = 2 * torch.sigmoid(pooled[row] @ reducer.b[0]) - 1
        sums[partner] += total[source] + total[source] * by_channel * by_pair
        number[partner] += sizes[source]
    kept = [position for _, position, _ in pairs[count:]]
    order = [*range(prefix), *(sorted(kept) if prefix else kept), *into]
    return sums[order] / number[order][:, None], number[order]


def straight_line(model, image):
    """Logits of one image."""
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(image[None])))[0]
    prefix, sizes = host.num_prefix_tokens, torch.ones(len(x))
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        x, keys = attend(block, x, sizes.log())
        if "pyra" in unit.mlp.reducers:
            x, sizes = merged(x, keys, sizes, prefix, unit.mlp.reducers["pyra"])
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return read_out(host, x, sizes)


@pytest.mark.parametrize("spec", RECORDED)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, spec):
    line, count = RECORDED[spec]
    model = dyntune.tune(recorded.host(), "linear", spec).eval()
    for block in model.backbone.blocks:
        recorded.fill(block.mlp.reducers, block.path + ".mlp.reducers.", NAMES)
    output = model.run(recorded.images)
    recorded.check(output.logits, line)
    assert output.reductions[-1].count == count
    assert output.tokens.provenance.sizes.sum(1).tolist() == [196, 196]


@torch.no_grad()
def test_without_modulation_it_is_tome_with_the_same_list(recorded):
    names = "/".join(map(str, HIGH))
    logits = dyntune.tune(recorded.host(), "linear", "pyra:r=high").eval()(recorded.images)
    recorded.check(logits, ".3179 .6440 -1.0809 -2.3546 .3394 | .4546 .3745 -1.2295 | 22.8712")
    torch.testing.assert_close(
        logits, dyntune.tune(recorded.host(), "linear", f"tome:r={names}").eval()(recorded.images)
    )


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_logits_are_those_of_the_written_out_steps(make_host, randomise, images_for, name):
    model = randomise(dyntune.tune(make_host(name), "linear", LIST), seed=4).eval()
    images = images_for(model.backbone.host, 3)
    logits = model(images)
    torch.testing.assert_close(logits, torch.stack([straight_line(model, image) for image in images]))
    torch.testing.assert_close(logits, torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, model.run(images, execution="masked").logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(logits, dyntune.tune(make_host(name), "linear", "tome:r=4/3/2").eval()(images), atol=1e-3)


@pytest.mark.parametrize("method", ["adaptformer", "adaptformer:where=layer", "full", "vpt", "vpt:deep=false", "lora"])
@pytest.mark.parametrize("gate", ["", "dyt:scale=0.5", "dispatch:where=mlp,rate=0.4"])
@torch.no_grad()
def test_beside_methods_and_gates(make_host, randomise, images_for, method, gate):
    if method.startswith("adaptformer") and gate.startswith("dyt"):
        pytest.skip("dyt has an adapter of that name")
    parts = [part for part in (method, LIST, gate) if part]
    model = randomise(dyntune.tune(make_host("registers"), *parts), seed=5).eval()
    images = images_for(model.backbone.host, 3)
    masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.logits, torch.cat([model(i[None]) for i in images]), atol=1e-5, rtol=1e-5)
    prompts = 8 if method.startswith("vpt") else 0
    assert [reduction.count for reduction in compact.reductions] == [prompts + 5 + n for n in (12, 9, 7)]
    assert [gate.values.shape[1] for gate in compact.gates] == ([12, 9, 7] if gate else [])
    assert not gate or 0 < sum(gate.values.mean() for gate in compact.gates) < 3


@pytest.mark.parametrize("where", ["attn", "attn-mlp", "layer"])
def test_gates_that_hide_keys_are_refused(make_host, where):
    with pytest.raises(BackboneError, match="reads queries and keys of all tokens"):
        dyntune.tune(make_host(), LIST, f"dispatch:where={where}")


def test_two_policies_that_reduce_are_refused(make_host):
    with pytest.raises(BackboneError, match="pyra"):
        dyntune.tune(make_host(), LIST, "tome:r=1")


@torch.no_grad()
def test_what_stands_beside_the_block_is_merged_with_the_same_factors(make_host, randomise):
    """The merge that was decided on is linear, so that tokens and the update beside them may be merged apart."""
    reducer = randomise(dyntune.tune(make_host(), LIST), seed=6).backbone.blocks[0].mlp.reducers["pyra"]
    x, update, *projected = torch.randn(5, 2, 17, 32, generator=torch.Generator().manual_seed(0))
    q, k, v = (part.unflatten(-1, (4, 8)) for part in projected)
    tokens = Tokens(x, 1, (4, 4))
    merge = reducer(tokens, Projected(q, k, v, k))
    together = merge(tokens.with_x(x + update)).x
    torch.testing.assert_close(together, merge(tokens).x + merge(tokens.with_x(update)).x)


def test_gradients_reach_what_is_trained(make_host, randomise, images_for):
    torch.manual_seed(0)
    model = randomise(dyntune.tune(make_host(), "adaptformer", LIST), seed=7).train()
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    assert all(name.startswith("host.") for name in frozen)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.backbone.host.set_grad_checkpointing(checkpointing)
        torch.manual_seed(1)
        images = images_for(model.backbone.host, 4)
        dyntune.training_loss(model, images, torch.arange(4)).total.backward()
        assert {n for n, p in model.backbone.named_parameters() if p.grad is None} == frozen
        gradients.append({n: p.grad.clone() for n, p in model.tuned_state().items()})
    # The class token, which the head reads, no longer looks at what the last block merges.
    unread = set(parameters(model, "blocks.2."))
    assert {name for name, gradient in gradients[0].items() if gradient.abs().max() == 0} == unread
    torch.testing.assert_close(gradients[1], gradients[0])


def test_gradients_are_those_of_the_written_out_steps(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "linear", LIST), seed=8).train()
    images = images_for(model.backbone.host, 2)
    own = torch.autograd.grad(model(images).square().sum(), list(parameters(model).values()))
    plain = torch.stack([straight_line(model, image) for image in images]).square().sum()
    for ours, theirs in zip(own, torch.autograd.grad(plain, list(parameters(model).values())), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_fresh_parameters(make_host):
    torch.manual_seed(0)
    model = dyntune.tune(make_host(img_size=256), "pyra:r=400/300")
    reducer = model.backbone.blocks[0].mlp.reducers["pyra"]
    assert reducer.a.shape == (400, 1)
    assert reducer.b.shape == (1, 32)
    assert reducer.b.abs().sum() == 0
    assert reducer.a.min() < -0.97
    assert reducer.a.max() > 0.97
    assert reducer.a.square().mean() == pytest.approx(1 / 3, rel=0.1)
    assert reducer.norm.eps == 1e-5


@torch.no_grad()
def test_published_tensors_are_loaded(make_host, randomise, images_for):
    source = randomise(dyntune.tune(make_host(), "linear", LIST), seed=9).eval()
    images = images_for(source.backbone.host, 2)
    state = {}
    for name, tensor in source.backbone.named_parameters():
        for ours, theirs in NAMES.items():
            name = re.sub(ours, theirs, name)
        state[name.removeprefix("host.")] = tensor
    assert state["blocks.1.pyra_a"].shape == (3, 1)
    assert state["blocks.1.pyra_norm.bias"].shape == (32,)
    model = dyntune.tune(make_host(seed=1), "linear", LIST).eval()
    dyntune.load_published(model, state)
    assert torch.equal(model(images), source(images))


@torch.no_grad()
def test_saved_and_loaded_model_is_equal(make_host, randomise, images_for, tmp_path):
    model = dyntune.tune(make_host(), "linear", LIST).eval()
    randomise(model.backbone.blocks, seed=9)
    loaded = dyntune.load(model.save(tmp_path / "saved"), backbone=make_host()).eval()
    assert loaded.spec == "linear+pyra:r=4/3/2"
    images = images_for(model.backbone.host, 2)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "converted"])
def test_runs_in_bf16(make_host, randomise, images_for, whole):
    model = randomise(dyntune.tune(make_host(), "adaptformer", LIST), seed=3)
    images = images_for(model.backbone.host, 2)
    if whole:
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        dyntune.training_loss(model.train(), images, torch.arange(2)).total.backward()
        output = model.eval().run(images)
    assert output.logits.isfinite().all()
    assert output.tokens.provenance.sizes.sum(1).tolist() == [16, 16]
    assert all(p.grad.isfinite().all() for p in parameters(model).values())


def test_named_schedules_are_those_published():
    assert Pyra("low").schedule(12, 196) == (*[16] * 11, 10)
    assert Pyra("high").schedule(12, 196) == HIGH
    assert Pyra("low").schedule(24, 196) == (*[8] * 23, 6)
    high = (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1)
    assert Pyra("high").schedule(24, 196) == high


def test_named_schedules_scale_with_depth_and_patches():
    assert Pyra("high").schedule(12, 4 * 196) == tuple(4 * number for number in HIGH)
    assert Pyra("high").schedule(6, 196) == (74, 54, 32, 18, 8, 5)  # the last would be 6, more than half of 10
    assert Pyra("low").schedule(3, 16) == (5, 5, 3)  # the last would be 5, more than half of 6
    for depth in (1, 2, 3, 7, 12, 18, 32, 40):
        for patches in (1, 2, 16, 49, 196, 256, 1369):
            for name in ("low", "high"):
                schedule = Pyra(name).schedule(depth, patches)
                left = patches
                for merges in schedule:
                    assert 0 <= merges <= left // 2
                    left -= merges
                assert schedule == Pyra(name).schedule(depth, patches)
                if depth >= 12 and patches >= 196:
                    rest = 4 if name == "high" else 10 if depth <= 18 else 6
                    assert left / patches == pytest.approx(rest / 196, abs=0.01)


def test_lists_are_capped_at_half_of_the_patches():
    assert Pyra((9, 2)).schedule(4, 16) == (8, 2, 0, 0)
    assert Pyra(7).schedule(4, 16) == (7, 4, 2, 1)
    assert Pyra((7, 0, 7)).schedule(3, 16) == (7, 0, 4)


def test_the_cap_makes_the_shapes(make_host):
    model = dyntune.tune(make_host("oblong"), "pyra:r=7")  # 3 x 5 patches
    assert [p.shape for n, p in parameters(model).items() if n.endswith(".a")] == [(7, 1), (4, 1), (2, 1)]


@torch.no_grad()
def test_other_image_sizes(make_host):
    model = dyntune.tune(make_host(dynamic_img_size=True), "pyra:r=6").eval()  # 6, 5, 2 of 16 patches
    assert model(torch.randn(1, 3, 40, 32)).shape == (1, 5)
    assert [r.count for r in model.run(torch.randn(1, 3, 40, 32)).reductions] == [15, 10, 8]
    with pytest.raises(BackboneError, match=r"6 pairs in front of blocks.0.mlp, but of the 8 .* only 4"):
        model(torch.randn(1, 3, 16, 32))


@pytest.mark.parametrize(
    "spec,reason",
    [
        ("pyra:r=-1", "r of at least 0"),
        ("pyra:r=3/-1", "r of at least 0"),
        ("pyra:r=medium", "one of low, high"),
        ("pyra:r=1/1/1/1", "at most 3 numbers"),
    ],
)
def test_bad_options_are_refused(make_host, spec, reason):
    with pytest.raises(SpecError, match=reason):
        dyntune.tune(make_host(), spec)


def test_a_list_of_one_number_cannot_be_written():
    with pytest.raises(SpecError, match="of at least two"):
        Pyra((8,))


def closed_form(schedule, tokens, width, heads, hidden_ratio=4):
    """MACs of blocks and last norm; tokens include a class token."""
    total = 0
    for merges in schedule:
        total += 4 * tokens * width**2 + 2 * tokens**2 * width + 5 * tokens * width
        if merges:
            total += (tokens // 2) * ((tokens - 1) // 2) * width // heads + 7 * merges * width
        tokens -= merges
        total += 2 * hidden_ratio * tokens * width**2 + 5 * tokens * width
    return total + 5 * tokens * width


@pytest.mark.parametrize("name,parameters,giga", [("low", 27_834, 8.816), ("high", 27_840, 5.099)])
def test_size_and_macs_of_the_published_models(name, parameters, giga):
    with shapes_only():
        model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), "lora", f"pyra:r={name}")
    schedule = Pyra(name).schedule(12, 196)
    cost = dyntune.cost(model)
    assert cost.trainable_params == 294_912 + parameters
    assert round((cost.macs + cost.head_macs) / 1e9, 3) == giga
    tokens = [197 - sum(schedule[:block]) for block in range(12)]
    lora = sum(8 * (768 + 3 * 768) * count for count in tokens)
    assert cost.macs == 196 * 768**2 + closed_form(schedule, 197, 768, 12) + lora


def test_size_and_macs_elsewhere(make_host):
    cost = dyntune.cost(dyntune.tune(make_host(), "linear", LIST))
    assert cost.trainable_params == 3 * 3 * 32 + 9
    assert cost.macs == 16 * 192 * 32 + closed_form((4, 3, 2), 17, 32, 4)
