"""EViT against logits recorded from the public code, and against its steps written out for one image."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from written_out import built, close, without_noise

import dyntune
from dyntune.core.errors import BackboneError, DyntuneError, SpecError, TrainingError
from dyntune.core.shapes import shapes_only
from dyntune.parts.policies.evit import EViT, KeepSchedule
from dyntune.parts.registry import resolve

RECORDED = {
    "evit": (".4138 .6302 -.9747 -1.9916 .4032 | .3990 .5335 -1.2462 | 21.9748", (140, 100, 72)),
    "evit:keep=0.85": (".4073 .6254 -.9802 -2.0233 .4192 | .4073 .5508 -1.2483 | 22.1407", (169, 145, 125)),
    "evit:fuse=false": (".4383 .6215 -.9614 -1.9801 .4210 | .4263 .5426 -1.2476 | 22.0443", (139, 98, 69)),
    "evit:keep=0.5": (".3997 .6208 -.9452 -2.0930 .3909 | .3897 .5247 -1.1902 | 22.1213", (100, 52, 28)),
    "evit:keep=1": (".4322 .6317 -.9800 -2.0359 .4140 | .4731 .5311 -1.2391 | 22.3676", ()),
}
HOSTS = {
    "plain": ("plain", {}),
    "deit3": ("deit3", {}),
    "registers": ("registers", {}),
    "clip": ("clip", {}),
    "average": ("average", {}),
    "qk_norm": ("qk_norm", {}),
    "swiglu_packed": ("swiglu_packed", {}),
    "oblong": ("oblong", {}),
    "distilled": ("distilled", {}),
    "attention pooling": ("plain", {"global_pool": "map"}),
}
SPEC = "evit:keep=0.7/0.6,layers=0/1"
METHODS = (
    "linear",
    "full",
    "adaptformer:scale=0.7",
    "full+adaptformer:scale=0.7",
    "vpt:prompts=3",
    "vpt:prompts=3,deep=false",
)


def straight_line(model, image, rates=(0.7, 0.6), fuse=True):
    """Logits of one image, and for each patch the number of its last token or -1; ``rates[i]`` is that of block i."""
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(image[None])))[0]
    own = prefix = host.num_prefix_tokens
    held = [{patch} for patch in range(len(x) - prefix)]  # patches inside each token
    patches = len(held)
    for index, (unit, block) in enumerate(zip(model.backbone.blocks, host.blocks, strict=True)):
        if "vpt" in unit.prompts:
            prompts = unit.prompts["vpt"].prompts
            x, prefix = torch.cat([x[:own], prompts, x[prefix:]]), own + len(prompts)
        change, scores = attention(block.attn, block.norm1(x))
        x = x + block.ls1(change)
        scores = scores[prefix:]
        kept = math.ceil(rates[index] * len(scores)) if index < len(rates) else len(scores)
        if kept < len(scores):
            order = sorted(range(len(scores)), key=lambda j: -scores[j].item())
            rows = [*x[:prefix], *(x[prefix + j] for j in order[:kept])]
            groups = [held[j] for j in order[:kept]]
            if fuse:
                rows.append(sum(scores[j] * x[prefix + j] for j in order[kept:]))
                groups.append(set().union(*(held[j] for j in order[kept:])))
            x, held = torch.stack(rows), groups
        update = block.ls2(block.mlp(block.norm2(x)))
        if "adapter" in unit.mlp.parallel:
            adapter = unit.mlp.parallel["adapter"]
            update = update + adapter.scale * adapter.up_proj(F.relu(adapter.down_proj(x)))
        x = x + update
    x = host.norm(x)
    owner = [next((j for j, group in enumerate(held) if patch in group), -1) for patch in range(patches)]
    return host.forward_head(torch.cat([x[:own], x[prefix:]])[None])[0], owner


def attention(attn, normed):
    """The update ``(N, C)``, and how much the first token attends to each, ``(N,)``, mean over heads."""
    joined, scores = [], []
    q, k, v = attn.qkv(normed).chunk(3, dim=-1)
    width = attn.head_dim
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        weights = torch.softmax(attn.q_norm(q[:, part]) @ attn.k_norm(k[:, part]).T / width**0.5, dim=-1)
        joined.append(weights @ v[:, part])
        scores.append(weights[0])
    return attn.proj(attn.norm(torch.cat(joined, dim=-1))), torch.stack(scores).mean(0)


@pytest.mark.parametrize("spec", RECORDED)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, spec):
    line, counts = RECORDED[spec]
    model = dyntune.tune(recorded.host(), "linear", spec).eval()
    for execution in ("masked", "compact"):
        output = model.run(recorded.images, execution=execution)
        recorded.check(output.logits, line)
        assert tuple(reduction.count for reduction in output.reductions) == counts
    for image, expected in zip(recorded.images, output.logits, strict=True):
        close(model(image[None])[0], expected)


@torch.no_grad()
def test_kept_patches_recorded_from_the_public_code(recorded):
    output = dyntune.tune(recorded.host(), "linear", "evit").eval().run(recorded.images)
    assert [reduction.unit for reduction in output.reductions] == ["blocks.3.mlp", "blocks.6.mlp", "blocks.9.mlp"]
    first, second, third = (reduction.provenance.owner[0].tolist() for reduction in output.reductions)
    assert [first.index(token) for token in range(6)] == [109, 136, 105, 60, 166, 6]
    assert sorted(set(first)) == list(range(139))
    assert first.count(138) == 196 - 138  # the fused token
    # Recorded numbers count the candidates of block 6, the tokens that block 3 has left, not patches.
    assert [first[second.index(token)] for token in range(6)] == [2, 61, 7, 24, 98, 120]
    assert sorted(set(second)) == list(range(99))
    assert sorted(set(third)) == list(range(71))


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_logits_and_owners_are_those_of_the_written_out_steps(make_host, randomise, images_for, name, fuse):
    host, changes = HOSTS[name]
    model = built(make_host, randomise, f"linear+{SPEC},fuse={fuse}", host, **changes)
    images = images_for(model.backbone.host, 3)
    expected, owners = zip(*(straight_line(model, image, fuse=fuse) for image in images), strict=True)
    for execution in ("masked", "compact"):
        output = model.run(images, execution=execution)
        close(output.logits, torch.stack(expected))
        assert output.tokens.provenance.owner.tolist() == list(owners)
    assert output.tokens.provenance.sizes is None and output.tokens.key_bias is None
    close(model(images[:1]), output.logits[:1])


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", ["plain", "registers"])
def test_with_tuning_methods_logits_and_gradients_are_those_of_the_written_out_steps(
    make_host, randomise, images_for, name, spec
):
    """A method on the tokens that are left; gradients flow through the scores into queries and keys."""
    model = without_noise(built(make_host, randomise, f"{spec}+{SPEC}", name)).train()
    images = images_for(model.backbone.host, 3)
    probe = torch.randn(3, 5, generator=torch.Generator().manual_seed(1))
    trained = model.tuned_state()
    expected = torch.stack([straight_line(model, image)[0] for image in images])
    wanted = torch.autograd.grad((expected * probe).sum(), list(trained.values()))
    output = model.run(images)
    close(output.logits, expected)
    (output.logits * probe).sum().backward()
    for (tensor, parameter), gradient in zip(trained.items(), wanted, strict=True):
        assert parameter.grad.abs().max() > 0, tensor
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4, msg=tensor)
    assert all(p.grad is None for name, p in model.backbone.named_parameters() if name not in trained)


@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(make_host, randomise, images_for):
    model = built(make_host, randomise, f"adaptformer+{SPEC}")
    images = images_for(model.backbone.host, 4)
    changed = images.clone()
    changed[1:] = images_for(model.backbone.host, 3, seed=5)
    before, after = model.run(images), model.run(changed)
    close(after.logits[0], before.logits[0])
    assert torch.equal(after.tokens.provenance.owner[0], before.tokens.provenance.owner[0])
    assert not torch.equal(after.tokens.provenance.owner[1], before.tokens.provenance.owner[1])


@torch.no_grad()
def test_features_share_the_fused_token_or_are_refused(make_host, randomise, images_for):
    model = built(make_host, randomise, f"linear+{SPEC}", "oblong")
    images = images_for(model.backbone.host, 2)
    features, tokens = model.features(images), model.run(images).tokens
    assert features.shape == (2, 32, 3, 5)
    for image in range(2):
        for patch, token in enumerate(tokens.provenance.owner[image].tolist()):
            close(features[image, :, patch // 5, patch % 5], tokens.patches[image, token])
    dropping = built(make_host, randomise, f"linear+{SPEC},fuse=false")
    with pytest.raises(DyntuneError, match="patches were dropped"):
        dropping.features(images_for(dropping.backbone.host, 2))


@pytest.mark.parametrize("gated", ["dispatch:recipe=published,rate=0.4", "dyt:recipe=published,rate=0.4"])
@pytest.mark.parametrize("fuse", [True, False])
def test_with_gates_masked_equals_compact_and_the_rate_is_over_the_tokens_left(
    make_host, randomise, images_for, gated, fuse
):
    model = built(make_host, randomise, f"{gated}+{SPEC},fuse={fuse}", "registers")
    images = images_for(model.backbone.host, 4)
    with torch.no_grad():
        masked, compact = (model.run(images, execution=execution) for execution in ("masked", "compact"))
    close(masked.logits, compact.logits)
    left = (13, 9, 9) if fuse else (12, 8, 8)
    assert [gate.values.shape[1] for gate in compact.gates] == list(left)
    assert 0 < sum(gate.values.mean() for gate in compact.gates) < 3
    last = compact.gates[-1]
    for image, owner in enumerate(last.provenance.owner.tolist()):
        expected = [last.values[image, token].item() if token >= 0 else 0.0 for token in owner]
        assert last.on_patches[image].tolist() == expected
    without_noise(model).train()
    loss = dyntune.training_loss(model, images, torch.arange(4))
    shares = torch.stack([gate.values.mean() for gate in loss.output.gates])
    close(loss.terms["rate"], 2 * (shares.mean() - 0.4) ** 2)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.tuned_state().values())


@torch.no_grad()
def test_the_update_of_a_module_beside_the_block_shrinks_with_the_tokens(make_host, randomise, images_for):
    """The fused token is linear in the tokens, so that what is added later is fused with the same weights."""
    model = built(make_host, randomise, f"adaptformer:where=layer,scale=0.7+{SPEC}")
    images = images_for(model.backbone.host, 2)
    x = model.backbone.embed(images)
    unit = model.backbone.blocks[0]
    parallel = unit.parallel_update(x)
    projected = unit.attn.projected(x)
    attended = x.with_x(x.x + unit.attn.change(x))
    shrink = unit.mlp.reducers["evit"](attended, projected)
    left = shrink(attended)
    expected = left.x + unit.mlp.change(left) + shrink(x.with_x(parallel)).x
    seen = []
    handle = model.backbone.host.blocks[1].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    masked, compact = (model.run(images, execution=execution).logits for execution in ("masked", "compact"))
    handle.remove()
    close(seen[0], expected)
    close(masked, compact)


def test_keep_falls_from_1_along_half_a_cosine(make_host, images_for):
    model = dyntune.tune(make_host(), "linear", "evit:keep=0.5,layers=0/1,start_epochs=2,shrink_epochs=4").train()
    images = images_for(model.backbone.host, 2)

    def counts(epoch):
        output = dyntune.training_loss(model, images, torch.arange(2), epoch=epoch).output
        return [reduction.count - 1 for reduction in output.reductions]

    assert counts(0.0) == counts(1.99) == counts(2.0) == []
    rate = 0.5 + 0.5 * (1 + math.cos(math.pi / 4)) / 2
    first = math.ceil(rate * 16) + 1
    assert counts(3.0) == [first, math.ceil(rate * first) + 1]
    assert counts(4.0) == [math.ceil(0.75 * 16) + 1, math.ceil(0.75 * 13) + 1]
    assert counts(6.0) == counts(100) == [9, 6]
    assert counts(0) == []
    with torch.no_grad():  # whatever the training has reached
        assert [reduction.count - 1 for reduction in model.eval().run(images).reductions] == [9, 6]


def test_keep_can_fall_at_once_and_follows_each_blocks_own_rate():
    schedule = KeepSchedule(start=3, shrink=0).train()
    rates = []
    for epoch in (0, 2.9, 3, 9):
        schedule.begin_step(epoch)
        rates.append((schedule.rate(0.7), schedule.rate(0.2)))
    assert rates == [(1, 1), (1, 1), (0.7, 0.2), (0.7, 0.2)]
    schedule.begin_step(0)
    assert schedule.eval().rate(0.7) == 0.7


def test_schedule_without_epochs_is_refused(make_host, images_for):
    images, labels = images_for(make_host(), 2), torch.arange(2)
    dyntune.training_loss(dyntune.tune(make_host(), "linear", SPEC).train(), images, labels)
    model = dyntune.tune(make_host(), "linear", f"{SPEC},shrink_epochs=4").train()
    with pytest.raises(TrainingError, match="epoch"):
        dyntune.training_loss(model, images, labels)


def test_attention_dropout_does_not_reach_the_scores(make_host, images_for):
    model = dyntune.tune(make_host(attn_drop_rate=0.5), "linear", "evit:keep=0.5,layers=0").train()
    images = images_for(model.backbone.host, 2)
    noisy, calm = model.run(images), model.eval().run(images)
    assert torch.equal(noisy.tokens.provenance.owner, calm.tokens.provenance.owner)
    assert not torch.equal(noisy.logits, calm.logits)


def test_gradient_checkpointing_gives_the_same_gradients(make_host, randomise, images_for):
    gradients = []
    for recompute in (False, True):
        model = without_noise(built(make_host, randomise, f"dyt+{SPEC},shrink_epochs=4", "registers")).train()
        model.backbone.host.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        images = images_for(model.backbone.host, 3)
        dyntune.training_loss(model, images, torch.arange(3), epoch=2.0).total.backward()
        gradients.append({name: p.grad for name, p in model.tuned_state().items()})
    for tensor, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][tensor], value, atol=1e-5, rtol=1e-4, msg=tensor)


@torch.no_grad()
def test_saved_and_loaded_model_is_equal(make_host, images_for, tmp_path):
    spec = f"{SPEC},fuse=false,start_epochs=1.5,shrink_epochs=10"
    model = dyntune.tune(make_host("registers"), "adaptformer", spec).eval()
    for parameter in model.tuned_state().values():
        parameter.normal_(std=0.2)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host("registers"))
    assert loaded.parts == model.parts
    assert loaded.spec == f"adaptformer+{spec}"
    images = images_for(model.backbone.host, 3)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("fuse", [True, False])
def test_runs_under_mixed_precision_and_in_bf16(make_host, randomise, images_for, fuse):
    model = without_noise(built(make_host, randomise, f"adaptformer+{SPEC},fuse={fuse}"))
    images = images_for(model.backbone.host, 4)
    expected = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.train().run(images)
    mixed.logits.float().sum().backward()
    assert (mixed.logits.float() - expected).abs().mean() < 0.2 * expected.abs().mean()
    assert model.eval().to(torch.bfloat16)(images.bfloat16()).isfinite().all()


def test_only_the_tuning_method_trains(make_host):
    alone, both = (dyntune.tune(make_host(), *parts) for parts in (["adaptformer"], ["adaptformer", SPEC]))
    assert set(both.tuned_state()) == set(alone.tuned_state())
    assert dyntune.cost(both).trainable_params == dyntune.cost(alone).trainable_params
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in alone.parameters())


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"keep": 0.0}, "keep above 0"),
        ({"keep": 1.1}, "keep above 0"),
        ({"keep": (0.7, 0.5)}, "as many as in layers"),
        ({"keep": "half"}, "a number"),
        ({"layers": ()}, "at least one block"),
        ({"layers": (3, 3)}, "each block once"),
        ({"layers": (-1,)}, "at least 0 in layers"),
        ({"start_epochs": -1.0}, "numbers of epochs"),
        ({"shrink_epochs": -1.0}, "numbers of epochs"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(SpecError, match=reason):
        EViT(**options)


def test_pairings_that_are_not_defined_are_refused(make_host):
    with pytest.raises(SpecError, match="block numbers from 0 to 2"):
        dyntune.tune(make_host(), "linear", "evit")
    with pytest.raises(BackboneError, match="no class token"):
        dyntune.tune(make_host("siglip"), "linear", SPEC)
    with pytest.raises(BackboneError, match="which tokens there are"):
        dyntune.tune(make_host(), "linear", "tome:r=2", SPEC)
    for where in ("attn", "attn-mlp", "layer"):
        with pytest.raises(BackboneError, match="does not compute for skipped tokens"):
            dyntune.tune(make_host(), f"dispatch:where={where}", SPEC)
    with pytest.raises(BackboneError, match="in its place in the grid"):
        dyntune.tune(make_host(), "convpass", SPEC)
    with pytest.raises(BackboneError, match="bypass"):
        dyntune.tune(make_host(), "res-tuning-bypass", SPEC)


def test_a_list_of_keep_rates_can_be_written():
    (part,) = resolve([SPEC])
    assert part == EViT(keep=(0.7, 0.6), layers=(0, 1))
    assert part.rates == (0.7, 0.6)
    assert EViT(keep=0.5).rates == (0.5, 0.5, 0.5)


COSTS = {  # giga MACs of ViT-B/16 with 100 classes
    (0.9, True): 15.411,
    (0.8, True): 13.340,
    (0.7, True): 11.622,
    (0.6, True): 10.098,
    (0.5, True): 8.828,
    (0.9, False): 15.283,
    (0.8, False): 13.214,
    (0.7, False): 11.497,
    (0.6, False): 9.994,
    (0.5, False): 8.725,
}


def closed_form(keep, fuse, bottleneck=0):
    """MACs of ViT-B/16 without head and class attention, and those of class attention."""
    width, count = 768, 197
    total, scoring = 196 * width * width, 0
    for block in range(12):
        total += 4 * count * width**2 + 2 * count**2 * width + 5 * count * width
        if block in (3, 6, 9):
            scoring += count * width
            count = 1 + math.ceil(keep * (count - 1)) + fuse
        total += 8 * count * width**2 + 5 * count * width + 2 * count * width * bottleneck
    return total + 5 * count * width, scoring


@pytest.mark.parametrize("keep,fuse", COSTS)
def test_macs_are_those_of_the_closed_form_and_the_published_ones(keep, fuse):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, "linear", f"evit:keep={keep},fuse={fuse}"))
    macs, scoring = closed_form(keep, fuse)
    assert cost.macs == macs + scoring
    assert (macs + cost.head_macs) / 1e9 == pytest.approx(COSTS[keep, fuse], abs=5.1e-4)


def test_macs_with_an_adapter_are_those_of_table_5():
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, "adaptformer:bottleneck=64", "evit"))
    macs, scoring = closed_form(0.7, True, bottleneck=64)
    assert cost.macs == macs + scoring
    assert (macs + cost.head_macs) / 1e9 == pytest.approx(11.7719, abs=5.1e-5)
    assert scoring == (197 + 140 + 100) * 768


def test_a_training_pass_counts_fewer_macs_than_a_dense_one(make_host, images_for):
    counts = []
    for parts in (["full"], ["full", SPEC]):
        model = dyntune.tune(make_host(), *parts).train()
        with dyntune.MacCounter() as counter:
            loss = dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.arange(2))
        loss.total.backward()
        counts.append(counter.macs)
    assert counts[1] < 0.75 * counts[0]
