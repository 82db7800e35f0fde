"""FPET against logits recorded from the public code, and against its equations written out for one image."""

from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from written_out import attend, read_out

import dyntune
from dyntune.core.errors import BackboneError, DyntuneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.dispatch import Dispatch
from dyntune.parts.policies.fpet import Halving, LowBitLinear, Refinement, checkerboard, quantiser_levels

RECORDED = {
    "fpet:block=6": ".4046 .5987 -.9924 -2.0649 .3842 | .4490 .4954 -1.2595 | 22.3986",
    "fpet:block=3": ".4318 .6802 -.9973 -2.0959 .4307 | .5084 .6119 -1.2420 | 22.7428",
}
NAMES = {r"\.mlp\.reducers\.fpet\.refinement\.(down|up)\.": r".refinement.adapter_\1."}
HOSTS = ("plain", "deit3", "registers", "distilled", "average", "siglip", "qk_norm", "swiglu", "oblong", "clip")
QUANTILES = {1: [-0.6744898, 0.6744898], 2: [-1.2657, -0.3778, 0.3778, 1.2657]}


def parameters(model):
    return {n: p for n, p in model.backbone.named_parameters() if ".reducers.fpet." in n}


def quantised(weight, bits):
    levels = torch.tensor(QUANTILES[bits])
    mean, deviation = weight.mean(), weight.std()
    standard = (weight - mean) / (deviation + 1e-5)
    nearest = levels[(standard.unsqueeze(-1) - levels).abs().argmin(-1)]
    return (standard + (nearest - standard).detach()) * deviation + mean


def halved(x, keys, prefix, grid, refinement, bits):
    """Tokens and sizes after the merge, with the straight-through gradient."""
    rows, columns = grid
    places = [(u, v) for u in range(rows) for v in range(columns)]
    a = [p for p in places if p[0] % 2 == 0 and p[1] % 2 == 0] + [p for p in places if p[0] % 2 and p[1] % 2]
    b = [p for p in places if p[0] % 2 and p[1] % 2 == 0] + [p for p in places if p[0] % 2 == 0 and p[1] % 2]
    a, b = ([prefix + u * columns + v for u, v in part] for part in (a, b))
    keys = keys.detach()
    hidden = F.relu(keys @ quantised(refinement.down.weight, bits).T)
    keys = keys + hidden @ quantised(refinement.up.weight, bits).T
    scores = F.cosine_similarity(keys[a].unsqueeze(1), keys[b].unsqueeze(0), dim=-1)
    middle = scores.topk(2).values.mean(-1, keepdim=True)
    soft = torch.sigmoid(scores - middle)
    links = soft + ((soft > 0.5).float() - soft).detach()
    sizes = 1 + links.sum(0)
    merged = (x[b] + torch.einsum("ik,ij->kj", links, x[a])) / sizes[:, None]
    return torch.cat([x[:prefix], merged]), torch.cat([torch.ones(prefix), sizes])


def straight_line(model, image, bits=1):
    """Logits of one image."""
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(image[None])))[0]
    prefix, sizes = host.num_prefix_tokens, torch.ones(len(x))
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        x, keys = attend(block, x, sizes.log())
        if "fpet" in unit.mlp.reducers:
            refinement = unit.mlp.reducers["fpet"].refinement
            x, sizes = halved(x, keys, prefix, host.patch_embed.grid_size, refinement, bits)
        x = x + block.ls2(block.mlp(block.norm2(x)))
    return read_out(host, x, sizes)


@pytest.mark.parametrize("spec", RECORDED)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, spec):
    model = dyntune.tune(recorded.host(), "linear", spec).eval()
    for block in model.backbone.blocks:
        recorded.fill(block.mlp.reducers, block.path + ".mlp.reducers.", NAMES)
    output = model.run(recorded.images)
    recorded.check(output.logits, RECORDED[spec])
    assert output.tokens.x.shape[1] == output.reductions[0].count == 99
    assert output.tokens.provenance.sizes.sum(1).tolist() == [196, 196]


def test_the_checkerboard_is_that_of_the_public_code():
    first, others = (part + 1 for part in checkerboard(14, 14, torch.device("cpu")))
    assert first[:10].tolist() == [1, 3, 5, 7, 9, 11, 13, 29, 31, 33]
    assert first[49:51].tolist() == [16, 18]
    assert others[:9].tolist() == [15, 17, 19, 21, 23, 25, 27, 43, 45]
    assert others[49:56].tolist() == [2, 4, 6, 8, 10, 12, 14]
    assert len(first) == len(others) == 98


def test_checkerboard_of_an_odd_oblong_grid():
    first, others = checkerboard(3, 5, torch.device("cpu"))
    assert first.tolist() == [0, 2, 4, 10, 12, 14, 6, 8]
    assert others.tolist() == [5, 7, 9, 1, 3, 11, 13]


@pytest.mark.parametrize("bits", [1, 2])
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_logits_are_those_of_the_written_out_steps(make_host, randomise, images_for, name, bits):
    model = randomise(dyntune.tune(make_host(name), "linear", f"fpet:block={2 - bits},bits={bits}"), seed=4).eval()
    images = images_for(model.backbone.host, 3)
    logits = model(images)
    expected = torch.stack([straight_line(model, image, bits) for image in images])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(logits, torch.cat([model(image[None]) for image in images]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, model.run(images, execution="masked").logits, atol=1e-5, rtol=1e-5)
    training = dyntune.tune(make_host(name), "linear", f"fpet:block={2 - bits},bits={bits},dropout=0").train()
    training.backbone.load_state_dict(model.backbone.state_dict())  # randomise() has changed frozen tensors too
    torch.testing.assert_close(training(images), logits, atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_written_out_steps(make_host, randomise, images_for):
    for bits in (1, 2):
        model = randomise(dyntune.tune(make_host(), "linear", f"fpet:block=0,dropout=0,bits={bits}"), seed=8).train()
        images = images_for(model.backbone.host, 2)
        own = torch.autograd.grad(model(images).square().sum(), list(parameters(model).values()))
        plain = torch.stack([straight_line(model, image, bits) for image in images]).square().sum()
        for ours, theirs in zip(own, torch.autograd.grad(plain, list(parameters(model).values())), strict=True):
            assert ours.abs().max() > 0
            torch.testing.assert_close(ours, theirs, atol=1e-3 * theirs.abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("bits", [1, 2])
def test_weights_take_few_values(bits):
    torch.manual_seed(0)
    linear = LowBitLinear(64, 32, bits)
    assert quantiser_levels(bits) == pytest.approx(QUANTILES[bits], abs=1e-4)
    weight = linear.quantised().detach()
    mean, deviation = linear.weight.mean().item(), linear.weight.std().item()
    assert sorted(weight.unique().tolist()) == pytest.approx(
        [level * deviation + mean for level in quantiser_levels(bits)], abs=1e-6
    )
    assert torch.equal((weight > mean).float(), (linear.weight > mean).float())
    with torch.no_grad():
        linear.weight.zero_()
    assert linear.quantised().abs().max() == 0


def test_fresh_refinement_is_small():
    torch.manual_seed(0)
    refinement = Refinement(64, 32, 1, 0.1)
    assert refinement.up.weight.abs().max() <= 0.002
    assert refinement.up.weight.std().item() == pytest.approx(0.00088, rel=0.1)
    assert refinement.down.weight.abs().max() <= 64**-0.5
    assert refinement.dropout.p == 0.1


@torch.no_grad()
def test_a_patch_whose_two_best_scores_tie_vanishes():
    refinement = Refinement(2, 4, 1, 0.0)
    refinement.up.weight.zero_()
    reducer = Halving(refinement, "blocks.0.mlp").eval()
    # 2 x 3 patches: A is 0, 2 and 4; B is 3, 5 and 1. Patch 0 is as near to 3 as to 5, 2 and 4 are nearest to 1.
    keys = torch.tensor([[9.0, 9], [1, 0], [0, 1], [0.6, 0.8], [2, 0], [0.1, 1], [2, 0]])[None, :, None]
    x = torch.arange(14.0).view(1, 7, 2)
    tokens = Tokens(x, 1, (2, 3))
    for reducer.training in (False, True):
        merge = reducer(tokens, Projected(keys, keys, keys, keys))
        out = merge(tokens)
        assert out.provenance.owner.tolist() == [[-1, 2, 2, 0, 2, 1]]
        assert out.provenance.sizes.tolist() == [[1, 1, 3]]
        assert torch.equal(out.x[0], torch.stack([x[0, 0], x[0, 4], x[0, 6], x[0, [2, 3, 5]].mean(0)]))
        torch.testing.assert_close(out.key_bias, out.provenance.sizes.log())
        with pytest.raises(DyntuneError, match="dropped"):
            out.on_grid()


@pytest.mark.parametrize("method", ["adaptformer", "adaptformer:where=layer", "full", "vpt", "vpt:deep=false", "lora"])
@pytest.mark.parametrize("gate", ["", "dyt:scale=0.5", "dispatch:where=mlp,rate=0.4"])
@torch.no_grad()
def test_beside_methods_and_gates(make_host, randomise, images_for, method, gate):
    if method.startswith("adaptformer") and gate.startswith("dyt"):
        pytest.skip("dyt has an adapter of that name")
    parts = [part for part in (method, "fpet", gate) if part]
    model = randomise(dyntune.tune(make_host("registers"), *parts), seed=5).eval()
    images = images_for(model.backbone.host, 3)
    masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked.logits, torch.cat([model(i[None]) for i in images]), atol=1e-5, rtol=1e-5)
    prompts = 8 if method.startswith("vpt") else 0
    assert [(reduction.unit, reduction.count) for reduction in compact.reductions] == [
        ("blocks.1.mlp", prompts + 5 + 8)
    ]
    assert [gate.values.shape[1] for gate in compact.gates] == ([16, 8, 8] if gate else [])
    assert not gate or 0 < sum(gate.values.mean() for gate in compact.gates) < 3


def test_gates_that_hide_keys_are_refused(make_host):
    for where in ("attn", "attn-mlp", "layer"):
        with pytest.raises(BackboneError, match="reads queries and keys of all tokens"):
            dyntune.tune(make_host(), "fpet", f"dispatch:where={where}")
    with pytest.raises(BackboneError, match="fpet"):
        dyntune.tune(make_host(), "fpet", "tome:r=1")


def test_a_gate_on_attention_behind_the_merge_is_refused(make_host):
    """Where merged tokens count by their size, which a gate on attention does not know of."""

    @dataclass(frozen=True)
    class Late(Dispatch):
        def gates(self, unit):
            return unit.path == "blocks.2.attn"

    with pytest.raises(BackboneError, match=r"fpet merges .*by size; a gate at blocks\.2\.attn"):
        dyntune.tune(make_host(), "fpet", Late(where="attn"))
    dyntune.tune(make_host(), "evit:keep=0.7,layers=1,fuse=false", Late(where="attn"))


def test_gradients_reach_what_is_trained(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "adaptformer", "fpet"), seed=7).train()
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
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@torch.no_grad()
def test_published_tensors_are_loaded(make_host, randomise, images_for):
    source = randomise(dyntune.tune(make_host(), "linear", "fpet:block=2,bits=2"), seed=9).eval()
    images = images_for(source.backbone.host, 2)
    state = {name.removeprefix("host."): tensor for name, tensor in source.backbone.named_parameters()}
    for part, shape in (("down", (32, 8)), ("up", (8, 32))):
        tensor = state.pop(f"blocks.2.mlp.reducers.fpet.refinement.{part}.weight")
        assert tensor.shape == shape
        state[f"blocks.2.refinement.adapter_{part}.weight"] = tensor
    model = dyntune.tune(make_host(seed=1), "linear", "fpet:block=2,bits=2").eval()
    dyntune.load_published(model, state)
    assert torch.equal(model(images), source(images))


@torch.no_grad()
def test_saved_and_loaded_model_is_equal(make_host, randomise, images_for, tmp_path):
    model = dyntune.tune(make_host(), "linear", "fpet:block=2,bits=2").eval()
    randomise(model.backbone.blocks, seed=9)
    loaded = dyntune.load(model.save(tmp_path / "saved"), backbone=make_host()).eval()
    assert loaded.spec == "linear+fpet:block=2,bits=2"
    images = images_for(model.backbone.host, 2)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("whole", [False, True], ids=["autocast", "converted"])
def test_runs_in_bf16_without_ties(make_host, randomise, images_for, whole):
    model = randomise(dyntune.tune(make_host(img_size=128), "adaptformer", "fpet:block=0"), seed=3)
    images = images_for(model.backbone.host, 2)
    if whole:
        model, images = model.to(torch.bfloat16), images.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=not whole):
        loss = dyntune.training_loss(model.train(), images, torch.arange(2))
        loss.total.backward()
        output = model.eval().run(images)
    for pass_ in (loss.output, output):
        assert pass_.logits.isfinite().all()
        assert pass_.tokens.provenance.sizes.sum(1).tolist() == [256, 256]
    assert all(0 < p.grad.abs().max() < torch.inf for p in parameters(model).values())


@torch.no_grad()
def test_other_image_sizes(make_host):
    model = dyntune.tune(make_host(dynamic_img_size=True), "fpet").eval()
    for rows, columns in ((2, 2), (1, 4), (3, 3), (5, 4)):
        output = model.run(torch.randn(2, 3, 8 * rows, 8 * columns))
        assert output.reductions[0].count == 1 + rows * columns // 2
        assert output.tokens.provenance.sizes.sum(1).tolist() == [rows * columns] * 2
    with pytest.raises(BackboneError, match="1 x 3 patches"):
        model(torch.randn(1, 3, 8, 24))


def test_block(make_host):
    for spec, block in (("fpet", 1), ("fpet:block=0", 0), ("fpet:block=2", 2)):
        first = next(iter(parameters(dyntune.tune(make_host(), spec))))
        assert first.startswith(f"blocks.{block}.mlp.reducers.fpet.")
    with pytest.raises(SpecError, match="block below 3, the number of blocks"):
        dyntune.tune(make_host(), "fpet:block=3")


@pytest.mark.parametrize("spec", ["fpet:block=-1", "fpet:hidden=0", "fpet:bits=3", "fpet:dropout=1"])
def test_bad_options_are_refused(make_host, spec):
    with pytest.raises(SpecError, match="expected"):
        dyntune.tune(make_host(), spec)


def closed_form(depth, block, first, second, width):
    """MACs of blocks and last norm, of whose tokens, a class token among them, there are ``second`` after the merge."""
    total = 0
    for index in range(depth):
        tokens = first if index <= block else second
        total += 4 * tokens * width**2 + 2 * tokens**2 * width + 5 * tokens * width
        tokens = first if index < block else second
        total += 8 * tokens * width**2 + 5 * tokens * width
    return total + 5 * second * width


@pytest.mark.parametrize(
    "method,block,published", [("linear", 6, 13.424), ("adaptformer", 6, 13.455), ("adaptformer", 3, 11.23)]
)
def test_size_and_macs_of_the_published_models(method, block, published):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
        model = dyntune.tune(host, method, f"fpet:block={block}")
    cost = dyntune.cost(model)
    assert sum(p.numel() for p in parameters(model).values()) == 4096
    blocks = 196 * 768**2 + closed_form(12, block, 197, 99, 768)
    matching = 196 * 4096 + 98 * 98 * 64
    adapters = 2 * 768 * 8 * (block * 197 + (12 - block) * 99)
    product = 98 * 99 * 769  # the public code merges by a matrix product, here nothing is multiplied in evaluation
    if method == "linear":
        assert cost.macs == blocks + matching
        assert round((blocks + cost.head_macs) / 1e9, 3) == published
    else:
        assert cost.macs == blocks + matching + adapters
        total = (cost.macs + cost.head_macs + product) / 1e9
        assert total == pytest.approx(published, abs=0.0005 if block == 6 else 0.005)


def test_size_and_macs_elsewhere(make_host):
    cost = dyntune.cost(dyntune.tune(make_host("oblong"), "linear", "fpet:hidden=6"))  # 3 x 5 patches, heads of 8
    assert cost.trainable_params == 2 * 8 * 6
    assert cost.macs == 15 * 192 * 32 + closed_form(3, 1, 16, 8, 32) + 15 * 2 * 8 * 6 + 8 * 7 * 8
