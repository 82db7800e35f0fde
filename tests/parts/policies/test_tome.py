"""ToMe against logits recorded from the public code, and against its steps written out for one image."""

import itertools

import pytest
import timm
import torch
import torch.nn.functional as F
from written_out import built, close, without_noise

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.matching import bipartite_matching, weighted_mean
from dyntune.core.shapes import shapes_only
from dyntune.parts.policies.tome import ToMe
from dyntune.parts.registry import resolve

RECORDED = {
    "tome:r=8": (".4272 .6136 -1.0297 -2.0852 .3975 | .4685 .4922 -1.2329 | 22.4818", 101),
    "tome:r=8,proportional=false": (".4404 .6552 -.9826 -2.0418 .3980 | .4707 .4959 -1.2385 | 22.4480", 101),
    "tome:r=7": (".4283 .6304 -1.0278 -2.0842 .3993 | .4777 .5247 -1.2492 | 22.4874", 113),
    "tome:r=8,inflect=-1": (".3742 .6103 -1.0081 -2.1677 .3743 | .5285 .5103 -1.3014 | 22.5489", 106),
    "tome:r=16": (".3597 .5939 -1.0190 -2.1709 .3795 | .5052 .5107 -1.3174 | 22.7514", 11),
    "tome:r=60": (".3172 .6930 -1.1937 -2.4141 .2274 | .6658 .4166 -1.1054 | 22.7560", 2),
}
LARGEST = {"tome:r=8": 52, "tome:r=8,proportional=false": 55, "tome:r=60": 196}
COUNTS = {
    "tome:r=8": list(range(189, 100, -8)),
    "tome:r=16": [181, 165, 149, 133, 117, 101, 85, 69, 53, 37, 21, 11],
    "tome:r=60": [137, 77, 39, 20, 11, 6, 4, 3, 2],
}
RECORDED_WITH_DYT = {
    7: ".7620 .6252 -.7652 -1.7135 .6637 | .8299 .7003 -.8906 | 20.6613",
    8: ".8387 .6076 -.7739 -1.6594 .6972 | .8365 .6654 -.8576 | 20.4949",
}
HOSTS = {
    "plain": ("plain", {}),
    "deit3": ("deit3", {}),
    "registers": ("registers", {}),
    "clip": ("clip", {}),
    "siglip": ("siglip", {}),
    "average": ("average", {}),
    "qk_norm": ("qk_norm", {}),
    "swiglu": ("swiglu", {}),
    "oblong": ("oblong", {}),
    "distilled": ("distilled", {}),
    "average with prefix": ("registers", {"global_pool": "avg", "pool_include_prefix": True}),
    "maximum": ("plain", {"global_pool": "max"}),
    "average and maximum": ("plain", {"global_pool": "avgmax"}),
    "attention pooling": ("registers", {"global_pool": "map"}),
    "no pooling": ("plain", {"global_pool": ""}),
}
SPECS = ("tome:r=3", "tome:r=4/0/3,proportional=false", "tome:r=4/0/3", "tome:r=9")
METHODS = (
    "linear",
    "full",
    "adaptformer:scale=0.7",
    "full+adaptformer:scale=0.7",
    "vpt:prompts=3",
    "vpt:prompts=3,deep=false",
)


def straight_line(model, image, policy):
    """Logits of one image, and the patches inside each of its last tokens."""
    host = model.backbone.host
    x = host.norm_pre(host._pos_embed(host.patch_embed(image[None])))[0]
    own = prefix = host.num_prefix_tokens
    held = [{patch} for patch in range(len(x) - prefix)]
    patches = len(held)
    schedule = policy.schedule(len(host.blocks))
    for unit, block, merges in zip(model.backbone.blocks, host.blocks, schedule, strict=True):
        if "vpt" in unit.prompts:
            prompts = unit.prompts["vpt"].prompts
            x, prefix = torch.cat([x[:own], prompts, x[prefix:]]), own + len(prompts)
        sizes = torch.tensor([1.0] * prefix + [float(len(group)) for group in held])
        change, keys = attention(block.attn, block.norm1(x), sizes if policy.proportional else torch.ones(len(x)))
        x = x + block.ls1(change)
        x, held = merged(x, keys, sizes, held, prefix, merges)
        update = block.ls2(block.mlp(block.norm2(x)))
        if "adapter" in unit.mlp.parallel:
            adapter = unit.mlp.parallel["adapter"]
            update = update + adapter.scale * adapter.up_proj(F.relu(adapter.down_proj(x)))
        x = x + update
    x = host.norm(x)
    # Pooling in which a token counts for its patches is plain pooling of as many copies.
    copies = [next(j for j, group in enumerate(held) if patch in group) for patch in range(patches)]
    return host.forward_head(torch.cat([x[:own], x[prefix:][copies]])[None])[0], held


def attention(attn, normed, sizes):
    """The update ``(N, C)`` in which key j counts ``sizes[j]`` times, and the mean key of all heads."""
    joined, keys = [], []
    q, k, v = attn.qkv(normed).chunk(3, dim=-1)
    width = attn.head_dim
    for head in range(attn.num_heads):
        part = slice(head * width, (head + 1) * width)
        key = attn.k_norm(k[:, part])
        weights = (attn.q_norm(q[:, part]) @ key.T / width**0.5).exp() * sizes
        joined.append(weights / weights.sum(1, keepdim=True) @ v[:, part])
        keys.append(key)
    return attn.proj(attn.norm(torch.cat(joined, dim=-1))), torch.stack(keys).mean(0).detach()


def merged(x, keys, sizes, held, prefix, merges):
    """The tokens, and the patches inside each, after one block has merged."""
    even, odd = (range(start, len(x), 2) for start in (0, 1))
    merges = min(merges, (len(x) - prefix) // 2)
    if not merges:
        return x, held
    cosine = F.cosine_similarity(keys[:, None], keys[None], dim=-1).tolist()
    matches = []
    for a in even:
        if a >= prefix:
            best = max((b for b in odd if b >= prefix), key=lambda b: cosine[a][b])
            matches.append((cosine[a][best], a, best))
    matches.sort(key=lambda match: -match[0])
    kept = [a for _, a, _ in matches[merges:]]
    kept = sorted(kept) if prefix else kept
    groups = [[a] for a in kept] + [[b, *(a for _, a, to in matches[:merges] if to == b)] for b in odd if b >= prefix]
    rows = [sum(sizes[j] * x[j] for j in group) / sum(sizes[j] for j in group) for group in groups]
    inside = [set().union(*(held[j - prefix] for j in group)) for group in groups]
    return torch.stack([*x[:prefix], *rows]), inside


def owners(held):
    """For each patch the number of its token."""
    return [number for _, number in sorted((patch, j) for j, group in enumerate(held) for patch in group)]


@pytest.mark.parametrize("spec", RECORDED)
@torch.no_grad()
def test_logits_recorded_from_the_public_code(recorded, spec):
    line, count = RECORDED[spec]
    model = dyntune.tune(recorded.host(), "linear", spec).eval()
    output = model.run(recorded.images)
    recorded.check(output.logits, line)
    counts = [reduction.count for reduction in output.reductions]
    assert output.tokens.x.shape[1] == counts[-1] == count
    assert counts == COUNTS.get(spec, counts)
    sizes = output.tokens.provenance.sizes
    assert sizes.sum(1).tolist() == [196, 196]
    if spec in LARGEST:
        assert sizes[0].max() == LARGEST[spec]
    if spec == "tome:r=8":
        assert sizes[0, :5].tolist() == [1, 1, 2, 1, 1]
    for image, expected in zip(recorded.images, output.logits, strict=True):
        close(model(image[None])[0], expected)


@pytest.mark.parametrize("r", RECORDED_WITH_DYT)
@torch.no_grad()
def test_logits_with_dyt_recorded(recorded, r):
    model = dyntune.tune(recorded.host(), "dyt:bottleneck=8,scale=0.1", f"tome:r={r}").eval()
    names = {r"\.mlp\.parallel\.adapter\.": ".adaptmlp.", r"\.mlp\.dispatcher\.gate\.": ".mlp_token_select.mlp_head."}
    recorded.fill(model.backbone.blocks, "blocks.", names)
    for execution in ("masked", "compact"):
        output = model.run(recorded.images, execution=execution)
        recorded.check(output.logits, RECORDED_WITH_DYT[r])
        assert [gate.values.shape[1] for gate in output.gates] == [196 - r * block for block in range(1, 13)]


@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_logits_and_owners_are_those_of_the_written_out_steps(make_host, randomise, images_for, name):
    host, changes = HOSTS[name]
    for spec in SPECS:
        model = built(make_host, randomise, f"linear+{spec}", host, **changes)
        images = images_for(model.backbone.host, 2)
        expected, held = zip(*(straight_line(model, image, model.policies[0]) for image in images), strict=True)
        for execution in ("masked", "compact"):
            output = model.run(images, execution=execution)
            close(output.logits, torch.stack(expected))
        sources = output.tokens.provenance
        assert sources.owner.tolist() == [owners(groups) for groups in held]
        assert sources.sizes.tolist() == [[len(group) for group in groups] for groups in held]
        close(model(images[:1]), output.logits[:1])


@pytest.mark.parametrize("spec", METHODS)
@pytest.mark.parametrize("name", ["plain", "registers"])
def test_with_tuning_methods_logits_and_gradients_are_those_of_the_written_out_steps(
    make_host, randomise, images_for, name, spec
):
    model = without_noise(built(make_host, randomise, f"{spec}+tome:r=3", name)).train()
    images = images_for(model.backbone.host, 2)
    probe = torch.randn(2, 5, generator=torch.Generator().manual_seed(1))
    trained = model.tuned_state()
    expected = torch.stack([straight_line(model, image, model.policies[-1])[0] for image in images])
    wanted = torch.autograd.grad((expected * probe).sum(), list(trained.values()))
    output = model.run(images)
    close(output.logits, expected)
    (output.logits * probe).sum().backward()
    for (tensor, parameter), gradient in zip(trained.items(), wanted, strict=True):
        assert parameter.grad.abs().max() > 0, tensor
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-4, rtol=1e-4, msg=tensor)
    assert all(p.grad is None for name, p in model.backbone.named_parameters() if name not in trained)


@pytest.mark.parametrize("count", [1, 2, 5, 6])
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("merges", [0, 1, 2, 60])
def test_matching_keeps_every_patch_once_and_merges_at_most_half(count, prefix, merges):
    metric = torch.randn(3, count, 4, generator=torch.Generator().manual_seed(count))
    matching = bipartite_matching(metric, prefix, merges)
    merges = min(merges, count // 2)
    if not merges:
        assert matching is None
        return
    others = [patch for patch in range(count) if (patch + prefix) % 2]
    assert matching.others.tolist() == others
    identity = torch.eye(count).expand(3, -1, -1)
    rows, sizes = weighted_mean(matching, identity, torch.ones(3, count))
    assert rows.shape == (3, count - merges, count)
    close(sizes.sum(1), torch.full((3,), float(count)))
    for image in range(3):
        sources = matching.src[image].tolist()
        assert len(set(sources)) == merges and not set(sources) & set(others)
        for token in range(count - merges):
            inside = [patch for patch in range(count) if matching.moved[image, patch] == token]
            assert (rows[image, token] * sizes[image, token]).round().nonzero().flatten().tolist() == inside


def test_most_similar_pairs_are_merged_by_size():
    """Four pairs of even and odd patches along four axes, of which the first and the last are nearest."""
    metric = torch.zeros(1, 8, 4)
    for pair, distance in enumerate((0.1, 0.4, 0.3, 0.2)):
        metric[0, 2 * pair, pair] = 1
        metric[0, 2 * pair + 1, pair] = 3.0  # the length does not count
        metric[0, 2 * pair + 1, (pair + 1) % 4] = 3 * distance
    matching = bipartite_matching(metric, 2, 2)
    assert matching.src.tolist() == [[0, 6]]
    assert matching.dst.tolist() == [[0, 3]]
    assert matching.kept.tolist() == [[2, 4]]
    assert bipartite_matching(metric, 0, 2).kept.tolist() == [[4, 2]]  # no prefix: by similarity
    assert matching.moved.tolist() == [[2, 2, 0, 3, 1, 4, 5, 5]]
    values, sizes = weighted_mean(
        matching, torch.arange(8.0)[None, :, None], torch.tensor([[3.0, 1, 1, 1, 1, 1, 1, 1]])
    )
    assert values[0, :, 0].tolist() == [2, 4, 0.25, 3, 5, 6.5]
    assert sizes.tolist() == [[1, 1, 4, 1, 1, 2]]


@pytest.mark.parametrize("name", ["plain", "oblong", "registers", "siglip"])
@torch.no_grad()
def test_features_of_merged_patches_are_those_of_their_token(make_host, randomise, images_for, name):
    model = built(make_host, randomise, "adaptformer+tome:r=3", name)
    images = images_for(model.backbone.host, 2)
    rows, columns = model.backbone.host.patch_embed.grid_size
    features, tokens = model.features(images), model.run(images).tokens
    assert features.shape == (2, 32, rows, columns)
    for image, (row, column) in itertools.product(range(2), itertools.product(range(rows), range(columns))):
        token = tokens.provenance.owner[image, row * columns + column]
        assert torch.equal(features[image, :, row, column], tokens.patches[image, token])
    assert not torch.equal(features, features.flip(2, 3))


@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(make_host, randomise, images_for):
    model = built(make_host, randomise, "adaptformer+tome:r=3")
    images = images_for(model.backbone.host, 4)
    changed = images.clone()
    changed[1:] = images_for(model.backbone.host, 3, seed=5)
    before, after = model.run(images), model.run(changed)
    close(after.logits[0], before.logits[0])
    assert torch.equal(after.tokens.provenance.owner[0], before.tokens.provenance.owner[0])
    assert not torch.equal(after.tokens.provenance.owner[1], before.tokens.provenance.owner[1])


@pytest.mark.parametrize("gated", ["dispatch:recipe=published,rate=0.4", "dyt:recipe=published,rate=0.4"])
@pytest.mark.parametrize("name", ["registers", "average", "siglip"])
def test_with_gates_masked_equals_compact_and_the_rate_is_over_the_tokens_left(
    make_host, randomise, images_for, gated, name
):
    model = built(make_host, randomise, f"{gated}+tome:r=3", name)
    images = images_for(model.backbone.host, 4)
    with torch.no_grad():
        masked, compact = (model.run(images, execution=execution) for execution in ("masked", "compact"))
    close(masked.logits, compact.logits)
    assert [gate.values.shape[1] for gate in compact.gates] == [13, 10, 7]
    assert 0 < sum(gate.values.mean() for gate in compact.gates) < 3
    for gate in compact.gates:
        assert gate.on_patches.shape == (4, 16)
        assert torch.equal(gate.on_patches, gate.values.gather(1, gate.provenance.owner))
    without_noise(model).train()
    loss = dyntune.training_loss(model, images, torch.arange(4))
    shares = torch.stack([gate.values.mean() for gate in loss.output.gates])
    close(loss.terms["rate"], 2 * (shares.mean() - 0.4) ** 2)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.tuned_state().values())


@torch.no_grad()
def test_the_update_of_a_module_beside_the_block_is_merged_with_the_tokens(make_host, randomise, images_for):
    model = built(make_host, randomise, "adaptformer:where=layer,scale=0.7+tome:r=3")
    images = images_for(model.backbone.host, 2)
    x = model.backbone.embed(images)
    unit = model.backbone.blocks[0]
    parallel = unit.parallel_update(x)
    attended = x.with_x(x.x + unit.attn.change(x))
    merge = unit.mlp.reducers["tome"](attended, unit.attn.projected(x))
    left = merge(attended)
    expected = left.x + unit.mlp.change(left) + merge(x.with_x(parallel)).x
    seen = []
    handle = model.backbone.host.blocks[1].norm1.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    masked, compact = (model.run(images, execution=execution).logits for execution in ("masked", "compact"))
    handle.remove()
    close(seen[0], expected)
    close(masked, compact)


def test_gradient_checkpointing_gives_the_same_gradients(make_host, randomise, images_for):
    gradients = []
    for recompute in (False, True):
        model = without_noise(built(make_host, randomise, "dyt+tome:r=3", "registers")).train()
        model.backbone.host.set_grad_checkpointing(recompute)
        torch.manual_seed(1)
        images = images_for(model.backbone.host, 3)
        dyntune.training_loss(model, images, torch.arange(3)).total.backward()
        gradients.append({name: p.grad for name, p in model.tuned_state().items()})
    for tensor, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][tensor], value, atol=1e-5, rtol=1e-4, msg=tensor)


@torch.no_grad()
def test_saved_and_loaded_model_is_equal(make_host, images_for, tmp_path):
    spec = "tome:r=4/0/3,proportional=false"
    model = dyntune.tune(make_host("registers"), "adaptformer", spec).eval()
    for parameter in model.tuned_state().values():
        parameter.normal_(std=0.2)
    loaded = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host("registers"))
    assert loaded.parts == model.parts
    assert loaded.spec == f"adaptformer+{spec}"
    images = images_for(model.backbone.host, 3)
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("name", ["plain", "average", "siglip"])
def test_runs_under_mixed_precision_and_in_bf16(make_host, randomise, images_for, name):
    model = without_noise(built(make_host, randomise, "adaptformer+tome:r=3", name))
    images = images_for(model.backbone.host, 4)
    expected = model(images).detach()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.train().run(images)
    mixed.logits.float().sum().backward()
    assert (mixed.logits.float() - expected).abs().mean() < 0.2 * expected.abs().mean()
    halved = model.eval().to(torch.bfloat16).run(images.bfloat16())
    assert halved.logits.isfinite().all()
    assert halved.logits.dtype == torch.bfloat16


@torch.no_grad()
def test_sizes_are_exact_in_bf16_beyond_256_patches(make_host, images_for):
    model = dyntune.tune(make_host(img_size=160, depth=8), "linear", "tome:r=200").eval().to(torch.bfloat16)
    sources = model.run(images_for(model.backbone.host, 4).bfloat16()).tokens.provenance
    assert sources.sizes.tolist() == [owner.bincount(minlength=2).tolist() for owner in sources.owner]
    assert ((sources.sizes > 256) & (sources.sizes % 2 == 1)).any()  # bf16 has even numbers only there


def test_only_the_tuning_method_trains(make_host):
    for method in ("adaptformer", "full"):
        alone, both = (dyntune.tune(make_host(), *parts) for parts in ([method], [method, "tome:r=3"]))
        assert set(both.tuned_state()) == set(alone.tuned_state())
        assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in alone.parameters())


def test_schedules():
    assert ToMe(r=8).schedule(12) == (8,) * 12
    assert ToMe(r=8, inflect=-1.0).schedule(12) == (16, 14, 13, 11, 10, 8, 7, 5, 4, 2, 1, 0)
    assert ToMe(r=16, inflect=-1.0).schedule(12) == (32, 29, 26, 23, 20, 17, 14, 11, 8, 5, 2, 0)
    assert ToMe(r=8, inflect=1.0).schedule(12) == (0, 1, 2, 4, 5, 7, 8, 10, 11, 13, 14, 16)
    assert ToMe(r=(5, 0, 3)).schedule(5) == (5, 0, 3, 0, 0)
    assert ToMe(r=8, inflect=0.5).schedule(1) == (4,)
    assert resolve(["tome:r=5/0/3"]) == (ToMe(r=(5, 0, 3)),)


@pytest.mark.parametrize(
    "options,reason",
    [
        ({"r": -1}, "at least 0"),
        ({"r": (3, -1)}, "at least 0"),
        ({"r": 1.5}, "a whole number"),
        ({"inflect": 1.1}, "inflect between"),
        ({"inflect": -1.1}, "inflect between"),
        ({"r": (3, 2), "inflect": 0.5}, "not with a list"),
        ({"proportional": 1}, "true or false"),
    ],
)
def test_options_out_of_range_are_refused(options, reason):
    with pytest.raises(SpecError, match=reason):
        ToMe(**options)


def test_pairings_that_are_not_defined_are_refused(make_host):
    with pytest.raises(SpecError, match="at most 3 numbers in r"):
        dyntune.tune(make_host(), "linear", "tome:r=1/1/1/1")
    with pytest.raises(BackboneError, match="is given twice"):
        dyntune.tune(make_host(), "linear", "tome", "tome")
    for where in ("attn", "attn-mlp", "layer"):
        with pytest.raises(BackboneError, match="does not compute for skipped tokens"):
            dyntune.tune(make_host(), f"dispatch:where={where}", "tome")
    with pytest.raises(BackboneError, match="in its place in the grid"):
        dyntune.tune(make_host(), "convpass", "tome")
    with pytest.raises(BackboneError, match="bypass"):
        dyntune.tune(make_host(), "res-tuning-bypass", "tome")


@torch.no_grad()
def test_r_of_0_leaves_the_host_as_it_is(make_host, randomise, images_for):
    model = built(make_host, randomise, "linear+tome:r=0")
    output = model.run(images_for(model.backbone.host, 2))
    close(output.logits, model.run(images_for(model.backbone.host, 2), complete=True).logits)
    assert output.reductions == ()


COSTS = dict(  # giga MACs of ViT-B/16 with 100 classes, without those of the matching
    zip(
        range(5, 17),
        (14.780, 14.224, 13.670, 13.117, 12.566, 12.017, 11.469, 10.922, 10.377, 9.834, 9.292, 8.781),
        strict=True,
    )
)


def closed_form(schedule, bottleneck=0):
    """MACs of ViT-B/16 without head and matching, and those of the matching."""
    width, count = 768, 197
    total, matching = 196 * width * width, 0
    for merges in schedule:
        total += 4 * count * width**2 + 2 * count**2 * width + 5 * count * width
        if merges:
            patches = count - 1
            matching += (patches // 2) * (patches - patches // 2) * 64
        count -= min(merges, (count - 1) // 2)
        total += 8 * count * width**2 + 5 * count * width + 2 * count * width * bottleneck
    return total + 5 * count * width, matching


def vit_base(*parts):
    with shapes_only():
        return dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), *parts)


@pytest.mark.parametrize("method,bottleneck", [("linear", 0), ("adaptformer:bottleneck=64", 64)])
def test_macs_are_those_of_the_closed_form_and_the_published_ones(method, bottleneck):
    model = vit_base(method, "tome")
    for r, published in COSTS.items():
        for block in model.backbone.blocks:
            block.mlp.reducers["tome"].merges = r
        assert dyntune.cost(model).macs == sum(closed_form([r] * 12, bottleneck))
        macs, matching = closed_form([r] * 12)
        assert (macs + 100 * 768) / 1e9 == pytest.approx(published, abs=5.1e-4)
        assert 0.0025e9 < matching < 0.006e9


@pytest.mark.parametrize("r,published", [(8, 11.768), (16, 5.871)])
def test_macs_of_a_falling_schedule(r, published):
    policy = ToMe(r=r, inflect=-1.0)
    macs = sum(closed_form(policy.schedule(12)))
    assert dyntune.cost(vit_base("linear", policy)).macs == macs
    assert (macs + 100 * 768) / 1e9 == pytest.approx(published, abs=5.1e-4)


def test_macs_of_table_5():
    for bottleneck, published in ((0, 13.1174), (64, 13.2884)):
        macs, _ = closed_form([8] * 12, bottleneck)
        assert (macs + 100 * 768) / 1e9 == pytest.approx(published, abs=5.1e-5)


@pytest.mark.parametrize("r", [(20,), ()])
def test_a_list_that_its_spec_would_not_give_back_is_refused(r):
    with pytest.raises(SpecError, match="of at least two"):
        ToMe(r=r)


@pytest.mark.parametrize("spec", ["dynamicvit:keep=0.5,layers=1", "evit:layers=1,fuse=false"])
def test_heads_of_dense_tasks_refuse_policies_that_drop(make_host, images_for, spec):
    with pytest.raises(BackboneError, match="reads every one of them"):
        dyntune.tune(make_host(global_pool=""), "linear", spec)
    model = dyntune.tune(make_host(global_pool=""), "linear", "tome:r=2").eval()
    assert model(images_for(model.backbone.host, 2)).shape == (2, 17, 5)
    assert dyntune.cost(model).macs < model.dense_macs


def test_a_model_that_is_trained_takes_it_when_it_is_loaded(make_host, images_for, tmp_path):
    saved = dyntune.tune(make_host(), "adaptformer").eval()
    loaded = dyntune.load(saved.save(tmp_path), backbone=make_host(), policy="tome:r=3")
    assert loaded.spec == "adaptformer+tome:r=3"
    images = images_for(loaded.backbone.host, 2)
    together = dyntune.tune(make_host(), "adaptformer", "tome:r=3").eval()
    together.load_state_dict(loaded.state_dict())
    torch.testing.assert_close(loaded(images), together(images))
    assert [r.count for r in loaded.run(images).reductions] == [14, 11, 8]
    with pytest.raises(SpecError, match="was not trained with"):
        dyntune.load(tmp_path, backbone=make_host(), policy="pyra:r=2")
