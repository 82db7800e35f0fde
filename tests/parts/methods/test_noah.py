"""NOAH's modules against straight-line code with mixed sizes, the published counts, and the supernet's slices."""

import copy
import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, CheckpointError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.noah import Noah, Space, Subnet
from dyntune.parts.spec import format_spec

MIXED = Subnet((2, 0, 3), (3, 1, 0), (0, 4, 2))
MIXED_SPEC = "noah:prompts=2/0/3,ranks=3/1/0,bottlenecks=0/4/2"
DENSE_VIT_B = 17_581_972_224


def vit_base_cost(spec):
    with shapes_only():
        model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), spec)
    return dyntune.cost(model)


def vit_macs(width, hidden, patches, patch_inputs, sizes, prefix=1):
    """MACs of a plain ViT without head, with the modules of ``sizes``, by the published convention."""
    total, tokens = patches * patch_inputs * width, prefix + patches
    there, previous = 0, 0
    for p, r, h in zip(sizes.prompts, sizes.ranks, sizes.bottlenecks, strict=True):
        if p:
            there += p - previous
        previous = p
        n = tokens + there
        total += n * (4 * width**2 + 2 * width * hidden + 10 * width + 4 * width * r + 2 * width * h)
        total += 2 * n * n * width
    return total + 5 * (tokens + there) * width


@pytest.mark.parametrize(
    "p,r,h,parameters",
    [
        (5, 0, 0, 12 * 768 * 5),
        (0, 8, 0, 294_912),
        (0, 0, 8, 156_768),
        (10, 10, 10, 12 * (7_680 + 30_720 + 15_370 + 768)),
    ],
)
def test_counts_on_vit_base(p, r, h, parameters):
    cost = vit_base_cost(f"noah:prompts={p},ranks={r},bottlenecks={h}")
    sizes = Subnet((p,) * 12, (r,) * 12, (h,) * 12)
    assert (cost.trainable_params, cost.dense_macs) == (parameters, DENSE_VIT_B)
    assert cost.macs == vit_macs(768, 3072, 196, 768, sizes)
    assert sizes.parameters(768) == parameters


def test_published_macs_of_parts_and_of_a_mixed_subnet():
    assert vit_base_cost("noah:prompts=8,ranks=0,bottlenecks=0").macs == 18_321_494_784
    assert vit_base_cost("noah:prompts=0,ranks=8,bottlenecks=0").macs == DENSE_VIT_B + 58_097_664
    assert vit_base_cost("noah:prompts=0,ranks=0,bottlenecks=8").macs == 17_611_021_056
    lists = ("5/10/1/5/10/10/5/1/1/0/0/0", "10/5/5/5/1/1/1/10/5/5/10/1", "1/1/5/5/10/10/1/1/5/0/0/0")
    sizes = Subnet(*(tuple(map(int, text.split("/"))) for text in lists))
    cost = vit_base_cost("noah:prompts={},ranks={},bottlenecks={}".format(*lists))
    parameters = 768 * 48 + 3072 * 59 + 1537 * 39 + 768 * 9
    assert cost.trainable_params == sizes.parameters(768) == parameters
    assert cost.macs == vit_macs(768, 3072, 196, 768, sizes)


def test_the_supernet_stores_and_counts_its_largest_subnet():
    cost, largest = vit_base_cost("noah"), vit_base_cost("noah:prompts=10,ranks=10,bottlenecks=10")
    assert (cost.trainable_params, cost.macs) == (largest.trainable_params, largest.macs)


@pytest.mark.parametrize(
    "spec,sizes", [(MIXED_SPEC, MIXED), ("noah:choices=1/2", Subnet((2,) * 3, (2,) * 3, (2,) * 3))]
)
def test_closed_form_counts(make_host, spec, sizes):
    cost = dyntune.cost(dyntune.tune(make_host(), spec))
    assert cost.trainable_params == sizes.parameters(32)
    assert cost.macs == vit_macs(32, 128, 16, 3 * 64, sizes)


def published_state(blocks, width, stored, seed=1):
    """Tensors of the public code, every module ``stored`` wide."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for i in range(blocks):
        shapes = {
            "visual_prompt_token": (1, stored, width),
            "attn.LoRA_a.weight": (stored, width),
            "attn.LoRA_b.weight": (3 * width, stored),
            "adapter.ln1.weight": (stored, width),
            "adapter.ln1.bias": (stored,),
            "adapter.ln2.weight": (width, stored),
            "adapter.ln2.bias": (width,),
        }
        for name, shape in shapes.items():
            state[f"blocks.{i}.{name}"] = torch.randn(shape, generator=generator) * 0.3
    return state


def used(state, sizes):
    """The tensors of which a sub-network uses a part."""
    kinds = {"visual_prompt": sizes.prompts, "LoRA": sizes.ranks, "adapter": sizes.bottlenecks}
    return {
        name: tensor
        for name, tensor in state.items()
        if next(by_block for kind, by_block in kinds.items() if kind in name)[int(name.split(".")[1])]
    }


def straight_line(host, state, sizes, images):
    """The public code's forward pass: prompts at the end of the sequence, sliced tensors, one block after the other."""
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    tokens = x.shape[1]
    for i, block in enumerate(host.blocks):
        p, r, h = sizes.prompts[i], sizes.ranks[i], sizes.bottlenecks[i]
        if p:
            last = sizes.prompts[i - 1] if i else 0
            kept = x[:, : x.shape[1] - last]
            x = torch.cat([kept, state[f"blocks.{i}.visual_prompt_token"][:, :p].expand(len(x), -1, -1)], 1)
        normed = block.norm1(x)
        qkv = F.linear(normed, block.attn.qkv.weight, block.attn.qkv.bias)
        if r:
            a, b = state[f"blocks.{i}.attn.LoRA_a.weight"], state[f"blocks.{i}.attn.LoRA_b.weight"]
            qkv = qkv + normed @ a[:r].T @ b[:, :r].T
        attn = block.attn
        q, k, v = qkv.reshape(*x.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
        q, k = attn.q_norm(q), attn.k_norm(k)
        mixed = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1) @ v
        z = x + block.ls1(attn.proj(attn.norm(mixed.transpose(1, 2).flatten(2))))
        u = block.ls2(block.mlp(block.norm2(z)))
        if h:
            ln1 = [state[f"blocks.{i}.adapter.ln1.{kind}"][:h] for kind in ("weight", "bias")]
            weight, bias = (state[f"blocks.{i}.adapter.ln2.{kind}"] for kind in ("weight", "bias"))
            hidden = F.linear(u, *ln1)
            u = u + F.linear(hidden * torch.sigmoid(1.702 * hidden), weight[:, :h], bias)
        x = z + u
    return host.forward_head(host.norm(x)[:, :tokens])


def filled(make_host, name, spec, state):
    host = make_host(name)
    model = dyntune.tune(host, spec).eval()
    heads = {f"head.{n}": p.detach() for n, p in host.head.named_parameters()}
    heads |= {
        f"head_dist.{n}": p.detach() for n, p in getattr(host, "head_dist", torch.nn.Identity()).named_parameters()
    }
    own = {name: p for name, p in host.named_parameters() if name.startswith("attn_pool") and p.requires_grad}
    dyntune.load_published(model, state | heads | own)
    return model


@torch.no_grad()
@pytest.mark.parametrize("stored", [10, 100])
def test_searched_subnet_equals_the_public_code_on_every_host(make_host, images_for, host_name, stored):
    host = make_host(host_name)
    images = images_for(host, 2)
    state = published_state(3, 32, stored)
    model = filled(make_host, host_name, MIXED_SPEC, used(state, MIXED))
    torch.testing.assert_close(model(images), straight_line(host, state, MIXED, images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_supernet_computes_any_subnet_by_slicing(make_host, images_for):
    host = make_host()
    images, state = images_for(host, 2), published_state(3, 32, 10)
    model = filled(make_host, "plain", "noah", state)
    space = Noah().space(3)
    for sizes in (space.largest, space.smallest, MIXED, Subnet((0, 0, 0), (10, 0, 0), (0, 0, 1))):
        model.backbone.shared["noah"].set_subnet(sizes)
        torch.testing.assert_close(model(images), straight_line(host, state, sizes, images), atol=1e-5, rtol=1e-5)
    nothing = Subnet(*((0, 0, 0),) * 3)
    model.backbone.shared["noah"].set_subnet(nothing)
    torch.testing.assert_close(model(images), host(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def tuned(make_host, spec, seed=3):
    """The plain host with random values in everything that is trained."""
    model = dyntune.tune(make_host(), spec).eval()
    generator = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.tuned_state().items()):
        p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


@torch.no_grad()
def test_a_subnet_of_the_supernet_is_the_searched_model_with_its_slices(make_host, images_for):
    supernet, alone = tuned(make_host, "noah"), tuned(make_host, MIXED_SPEC)
    stored = supernet.tuned_state()
    for name, p in alone.tuned_state().items():
        p.copy_(stored[name][tuple(slice(size) for size in p.shape)])
    images = images_for(supernet.backbone.host, 2)
    assert not torch.allclose(alone(images), supernet(images), atol=1e-2)
    supernet.backbone.shared["noah"].set_subnet(MIXED)
    torch.testing.assert_close(alone(images), supernet(images), atol=1e-5, rtol=1e-5)


def test_prompts_left_by_an_earlier_block_stay(make_host, randomise, images_for):
    """After 2/0/3 both the first block's 2 prompts and the third block's 3 are there."""
    model = randomise(dyntune.tune(make_host(), MIXED_SPEC)).eval()
    tokens = model.backbone.embed(images_for(model.backbone.host, 1))
    counts = []
    for block in model.backbone.blocks:
        tokens = block.enter(tokens)
        counts.append((tokens.prompts, tokens.prefix, tokens.x.shape[1]))
    assert counts == [(2, 3, 19), (2, 3, 19), (5, 6, 22)]


def test_subnets_that_are_no_part_of_the_supernet_are_refused(make_host):
    selection = dyntune.tune(make_host(), "noah").backbone.shared["noah"]
    for sizes in (
        Subnet((1, 1), (1, 1), (1, 1)),
        Subnet((11, 1, 1), (0,) * 3, (0,) * 3),
        Subnet((-1, 0, 0), *((0,) * 3,) * 2),
    ):
        with pytest.raises(SpecError, match=r"noah: prompts=.* is no part of the supernet"):
            selection.set_subnet(sizes)


def test_each_training_step_draws_a_subnet_from_the_cpu_generator(make_host, images_for):
    part = Noah(depths=(1, 2, 3))
    model = dyntune.tune(make_host(), part)
    selection, images = model.backbone.shared["noah"], images_for(model.backbone.host, 2)
    space = part.space(3)
    seen = []
    for seed in (0, 1, 2, 0):
        torch.manual_seed(seed)
        dyntune.training_loss(model.train(), images, torch.tensor([0, 1]))
        seen.append(selection.sizes)
        model(images)
        assert selection.sizes == seen[-1]  # another pass of the same step
        for sizes in vars(selection.sizes).values():
            depth = sum(map(bool, sizes))
            assert depth in space.depths and set(sizes[:depth]) <= {1, 5, 10} and not any(sizes[depth:])
    assert seen[0] == seen[3] and len(set(seen)) == 3
    assert model.eval().backbone.shared["noah"].sizes == space.largest
    before = torch.get_rng_state()
    model(images)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_passes_of_a_step_compute_the_same_subnet(make_host, images_for, checkpointing):
    model = dyntune.tune(make_host(), "noah:dropout=0,depths=1/2/3", "dispatch").train()
    model.backbone.host.set_grad_checkpointing(checkpointing)
    used = []
    adapter = model.backbone.blocks[0].mlp.sequential["noah"]
    adapter.register_forward_hook(lambda module, *_: used.append(module.selection.sizes))
    for seed in range(4):
        torch.manual_seed(seed)
        dyntune.training_loss(model, images_for(model.backbone.host, 2), torch.tensor([0, 1])).total.backward()
        assert len(used) >= 2 + checkpointing and len(set(used)) == 1
        used.clear()


@torch.no_grad()
def test_merging_folds_what_evaluation_computes(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "noah"), 1)
    images = images_for(model.backbone.host, 2)
    expected = model.eval()(images)
    model.train().backbone.begin_step()
    model.merge()
    torch.testing.assert_close(model.eval()(images), expected, atol=1e-4, rtol=1e-4)


def test_the_space_is_that_of_the_published_search():
    assert Noah().space(12) == Space(12, (1, 5, 10), (3, 6, 9, 12))
    assert Noah().space(24).depths == (6, 12, 18, 24)
    assert Noah().space(3).depths == (3,)
    assert Noah(depths=(2, 40), choices=(5, 50)).space(12) == Space(12, (5, 50), (2, 12))
    generator = torch.Generator().manual_seed(0)
    drawn = [Noah().space(12).draw(lambda n: int(torch.randint(n, (), generator=generator))) for _ in range(400)]
    depths = [sum(map(bool, sizes)) for subnet in drawn for sizes in vars(subnet).values()]
    assert all(abs(depths.count(depth) / 1200 - 0.25) < 0.05 for depth in (3, 6, 9, 12))
    widths = [size for subnet in drawn for sizes in vars(subnet).values() for size in sizes if size]
    assert all(abs(widths.count(width) / len(widths) - 1 / 3) < 0.03 for width in (1, 5, 10))
    assert Noah().space(12).smallest.parameters(768) == 3 * (768 + 3072 + 1537 + 768)


def bounds(model):
    """Largest absolute value of each tuned tensor but the head's."""
    return {name: p.abs().max().item() for name, p in model.tuned_state().items() if "head" not in name}


def test_initial_values(make_host):
    torch.manual_seed(0)
    fresh = bounds(dyntune.tune(make_host(), "noah:prompts=40,ranks=30,bottlenecks=30"))
    published = bounds(dyntune.tune(make_host(), "noah:prompts=40,ranks=30,bottlenecks=30,init=noah"))
    for i in range(3):
        prompts, down, up = (
            f"blocks.{i}.prompts.noah.prompts",
            f"host.blocks.{i}.attn.qkv.changes.noah.down.weight",
            f"host.blocks.{i}.attn.qkv.changes.noah.up.weight",
        )
        adapter = f"blocks.{i}.mlp.sequential.noah."
        assert 0.9 < fresh[prompts] / math.sqrt(6 / (32 * 40 + 32)) <= 1
        assert 0.9 < fresh[down] * math.sqrt(32) <= 1
        assert 0.9 < fresh[adapter + "down_proj.weight"] / math.sqrt(6 / (32 + 30)) <= 1
        zeros = (up, adapter + "up_proj.weight", adapter + "up_proj.bias", adapter + "down_proj.bias")
        assert all(fresh[name] == 0 for name in zeros)
        assert 0.9 < published[prompts] / math.sqrt(6 / (32 * 100 + 32)) <= 1
        for name in (down, up, adapter + "down_proj.weight", adapter + "up_proj.weight"):
            assert 0.04 < published[name] < 0.12
        assert published[adapter + "up_proj.bias"] == published[adapter + "down_proj.bias"] == 0
    weight = (
        dyntune.tune(make_host(), "noah:init=noah,choices=100").backbone.blocks[0].mlp.sequential["noah"].up_proj.weight
    )
    assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_without_prompts_it_starts_as_the_host(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    model = dyntune.tune(copy.deepcopy(host), "noah:prompts=0,ranks=4,bottlenecks=4").eval()
    torch.testing.assert_close(model(images), host(images), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("spec", [MIXED_SPEC, MIXED_SPEC + ",init=noah"])
def test_gradients_reach_exactly_what_is_trained(make_host, randomise, images_for, spec):
    model = randomise(dyntune.tune(make_host(), spec)).train()
    dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
    reached = {name for name, p in model.backbone.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert reached == set(model.tuned_state())
    modules = {name.rpartition(".noah.")[0] for name in reached if "noah" in name}
    expected = {"blocks.0.prompts", "blocks.2.prompts", "blocks.1.mlp.sequential", "blocks.2.mlp.sequential"}
    assert modules == expected | {f"host.blocks.{i}.attn.qkv.changes" for i in (0, 1)}


def test_supernet_gradients_are_those_of_the_drawn_slices(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "noah:depths=1/2")).train()
    torch.manual_seed(0)
    dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
    sizes = model.backbone.shared["noah"].sizes
    for i, block in enumerate(model.backbone.blocks):
        adapter, prompts = block.mlp.sequential["noah"], block.prompts["noah"].prompts
        p, h = sizes.prompts[i], sizes.bottlenecks[i]
        assert prompts.grad[:p].abs().sum(1).gt(0).all() and not prompts.grad[p:].any()
        assert adapter.down_proj.weight.grad[:h].any(1).all() and not adapter.down_proj.weight.grad[h:].any()
        assert adapter.up_proj.weight.grad[:, :h].any(0).all() and not adapter.up_proj.weight.grad[:, h:].any()
        assert adapter.up_proj.bias.grad.any() == (h > 0)
    for site in model.backbone.sites("qkv"):
        change, r = site.changes["noah"], sizes.ranks[site.block]
        assert change.down.weight.grad[:r].any(1).all() and not change.down.weight.grad[r:].any()
        assert change.up.weight.grad[:, :r].any(0).all() and not change.up.weight.grad[:, r:].any()


def test_dropout_acts_on_prompts_inputs_and_hidden_values(make_host, images_for):
    model = dyntune.tune(make_host(), "noah:prompts=4,ranks=2,bottlenecks=2,dropout=0.25")
    seen = {}
    for name, module in model.backbone.named_modules():
        if isinstance(module, torch.nn.Dropout) and ".noah." in name:
            module.register_forward_hook(lambda _, args, out, name=name: seen.update({name: (args[0], out)}))
    torch.manual_seed(0)
    model.train()(images_for(model.backbone.host, 8))
    assert len(seen) == 9
    for name, (given, out) in seen.items():
        kept = out != 0
        assert kept.float().mean().item() == pytest.approx(0.75, abs=0.1), name
        torch.testing.assert_close(out[kept], given[kept] / 0.75)
    prompts = seen["blocks.0.prompts.noah.dropout"][1]
    assert not torch.equal(prompts[0] != 0, prompts[1] != 0)  # every image loses other values


@pytest.mark.parametrize("spec,sizes", [(MIXED_SPEC, MIXED), ("noah", Noah().space(3).largest)])
def test_saved_and_loaded_subnet_holds_its_slices_only(make_host, images_for, tmp_path, spec, sizes):
    model = tuned(make_host, spec)
    again = dyntune.load(model.save(tmp_path / "adapter"), backbone=make_host())
    images = images_for(model.backbone.host, 2)
    assert again.spec == spec
    assert torch.equal(again(images), model(images))
    assert sum(p.numel() for name, p in again.tuned_state().items() if "head" not in name) == sizes.parameters(32)


def test_checkpoints_of_another_depth_are_refused(make_host):
    model = dyntune.tune(make_host(), "noah:prompts=2,ranks=2,bottlenecks=2")
    with pytest.raises(CheckpointError, match=r"blocks\.3\..* has no place"):
        dyntune.load_published(model, published_state(4, 32, 10))
    with pytest.raises(CheckpointError, match="lacks"):
        dyntune.load_published(model, published_state(2, 32, 10))


@torch.no_grad()
@pytest.mark.parametrize("where", ["mlp", "attn", "attn-mlp", "layer"])
def test_masked_equals_compact_under_dispatch(make_host, randomise, images_for, where):
    model = randomise(dyntune.tune(make_host("registers"), MIXED_SPEC, f"dispatch:where={where}")).eval()
    images = images_for(model.backbone.host, 3)
    masked, compact = (model.run(images, execution=how) for how in ("masked", "compact"))
    rate = torch.stack([gate.values.mean() for gate in compact.gates]).mean()
    assert 0 < rate < 1
    torch.testing.assert_close(masked.logits, compact.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("spec", [MIXED_SPEC, "noah:depths=1/2/3"])
def test_gradient_checkpointing_gives_the_same_gradients(make_host, randomise, images_for, spec):
    gradients = []
    for checkpointing in (False, True):
        model = randomise(dyntune.tune(make_host(), spec + ",dropout=0")).train()
        model.backbone.host.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total.backward()
        gradients.append({name: p.grad for name, p in model.tuned_state().items()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("spec", [MIXED_SPEC, "noah:depths=1/2/3"])
def test_runs_and_learns_under_bf16(make_host, randomise, images_for, spec):
    model = randomise(dyntune.tune(make_host(), spec)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = dyntune.training_loss(model, images_for(model.backbone.host, 4), torch.arange(4)).total
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.tuned_state().values())


@torch.no_grad()
def test_merge_folds_the_low_rank_updates_and_says_what_stays(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), MIXED_SPEC)).eval()
    images = images_for(model.backbone.host, 2)
    expected, before = model(images), dyntune.cost(model).macs
    merged = model.merge()
    assert merged is model
    assert model.unmerged == {MIXED_SPEC: Noah.stays}
    assert "prompts" in Noah.stays and "adapters" in Noah.stays
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    assert before - dyntune.cost(model).macs == 4 * 32 * (3 * 19 + 1 * 19)


@torch.no_grad()
def test_low_rank_updates_alone_merge_completely(make_host, randomise, images_for):
    model = randomise(dyntune.tune(make_host(), "noah:prompts=0,ranks=3/0/1,bottlenecks=0")).eval()
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    merged = model.merge()
    assert type(merged) is timm.models.vision_transformer.VisionTransformer and not model.unmerged
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"prompts": (5,)},
        {"prompts": (5,), "ranks": (5,)},
        {"prompts": (-1,), "ranks": (0,), "bottlenecks": (0,)},
        {"choices": ()},
        {"choices": (0, 5)},
        {"depths": (0,)},
        {"dropout": 1.0},
    ],
)
def test_bad_options_are_refused(options):
    with pytest.raises(SpecError, match="noah: expected"):
        Noah(**options)


def test_lists_must_fit_the_backbone(make_host):
    with pytest.raises(BackboneError, match="noah: ranks has 2 numbers, but the backbone has 3 blocks"):
        dyntune.tune(make_host(), "noah:prompts=1,ranks=1/2,bottlenecks=0")
    with pytest.raises(BackboneError, match="insert tokens"):
        dyntune.tune(make_host(), "vpt", "noah")


def test_sizes_are_written_as_a_spec():
    assert format_spec(Noah(dropout=0.2).with_sizes(MIXED)) == MIXED_SPEC + ",dropout=0.2"
