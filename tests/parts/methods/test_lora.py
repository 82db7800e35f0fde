"""LoRA against straight-line code of both public forms, the published counts, and its folding."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import SpecError
from dyntune.core.shapes import shapes_only
from dyntune.parts.methods.lora import LoRA


@pytest.mark.parametrize("spec", ["lora", "lora:targets=q/v,dropout_on=hidden"])
def test_published_counts(spec):
    with shapes_only():
        model = dyntune.tune(timm.create_model("vit_base_patch16_224", num_classes=100), spec)
    cost = dyntune.cost(model)
    assert (cost.trainable_params, cost.macs) == (294_912, 17_581_972_224 + 58_097_664)


@pytest.mark.parametrize(
    "targets,per_rank",
    [("qkv", 4 * 32), ("q/k/v", 6 * 32), ("proj", 2 * 32), ("fc1/fc2", 2 * 5 * 32), ("qkv/q/proj", (4 + 2 + 2) * 32)],
)
def test_closed_form_counts(make_host, targets, per_rank):
    cost = dyntune.cost(dyntune.tune(make_host(), f"lora:rank=3,targets={targets}"))
    assert cost.trainable_params == 3 * 3 * per_rank
    assert cost.macs - cost.dense_macs == 17 * cost.trainable_params


def block_by_hand(host, block, x, update):
    """A block of timm with ``update(normed)`` added to its query-key-value projection."""
    normed = block.norm1(x)
    attn = block.attn
    qkv = F.linear(normed, attn.qkv.weight, attn.qkv.bias) + update(normed)
    heads = qkv.reshape(*x.shape[:2], 3, attn.num_heads, attn.head_dim).permute(2, 0, 3, 1, 4)
    q, k, v = attn.q_norm(heads[0]), attn.k_norm(heads[1]), heads[2]
    weights = (q @ k.transpose(-2, -1) * attn.head_dim**-0.5).softmax(-1)
    x = x + block.ls1(attn.proj(attn.norm((weights @ v).transpose(1, 2).flatten(2))))
    return x + block.ls2(block.mlp(block.norm2(x)))


@torch.no_grad()
@pytest.mark.parametrize("name", ["plain", "registers", "qk_norm"])
def test_fused_form_equals_straight_line_code_under_the_public_names(make_host, images_for, name):
    host = make_host(name)
    images = images_for(host, 2)
    generator = torch.Generator().manual_seed(1)
    state = {}
    for index in range(3):
        state[f"blocks.{index}.attn.LoRA_a.weight"] = torch.randn(5, 32, generator=generator) * 0.3
        state[f"blocks.{index}.attn.LoRA_b.weight"] = torch.randn(96, 5, generator=generator) * 0.3
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for index, block in enumerate(host.blocks):
        a, b = (state[f"blocks.{index}.attn.LoRA_{part}.weight"] for part in "ab")
        x = block_by_hand(host, block, x, lambda y, a=a, b=b: y @ a.T @ b.T)
    expected = host.forward_head(host.norm(x))
    model = dyntune.tune(host, "lora:rank=5").eval()
    dyntune.load_published(model, state | {f"head.{n}": p.clone() for n, p in host.head.named_parameters()})
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(copy.deepcopy(host)(images), expected, atol=1e-5, rtol=1e-5)  # the host carries it, too


@torch.no_grad()
def test_separate_form_equals_straight_line_code_under_the_public_names(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    generator = torch.Generator().manual_seed(1)
    state = {
        f"blocks.{index}.attn.lora_{part}.adapter_{way}.weight": torch.randn(*shape, generator=generator) * 0.3
        for index in range(3)
        for part in "qv"
        for way, shape in (("down", (4, 32)), ("up", (32, 4)))
    }
    x = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for index, block in enumerate(host.blocks):

        def update(y, index=index):
            def delta(part):
                down, up = (state[f"blocks.{index}.attn.lora_{part}.adapter_{way}.weight"] for way in ("down", "up"))
                return 10.0 * (y @ down.T) @ up.T

            return torch.cat([delta("q"), torch.zeros_like(y), delta("v")], -1)

        x = block_by_hand(host, block, x, update)
    expected = host.forward_head(host.norm(x))
    model = dyntune.tune(host, "lora:rank=4,targets=q/v,scale=10,dropout_on=hidden").eval()
    dyntune.load_published(model, state | {f"head.{n}": p.clone() for n, p in host.head.named_parameters()})
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("targets", ["qkv", "q/v", "k/proj/fc1/fc2"])
def test_folds_into_the_plain_host(make_host, randomise, images_for, host_name, targets):
    host = make_host(host_name)
    images = images_for(host, 2)
    plain = {name: p.shape for name, p in host.named_parameters()}
    model = dyntune.tune(host, f"lora:targets={targets},scale=0.3").eval()
    randomise(model.backbone.blocks, 3)
    for name, tensor in model.tuned_state().items():
        torch.nn.init.normal_(tensor, std=0.2, generator=torch.Generator().manual_seed(len(name)))
    expected = model(images)
    merged = model.merge()
    assert merged is host
    assert {name: p.shape for name, p in merged.named_parameters()} == plain
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    assert dyntune.cost(model).macs == dyntune.cost(model).dense_macs


def changes(model):
    return [change for site in model.backbone.sites() for change in site.changes.values()]


def test_initialisation(make_host):
    torch.manual_seed(0)
    for change in changes(dyntune.tune(make_host(), "lora")):
        assert change.up.weight.abs().max() == 0
        assert 0.8 / 32**0.5 < change.down.weight.abs().max() <= 1 / 32**0.5
    for change in changes(dyntune.tune(make_host(), "lora:init=noah,rank=64")):
        for weight in (change.up.weight, change.down.weight):
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_dropout_stands_where_it_is_asked_for(make_host):
    torch.manual_seed(0)
    for spec, seen in (("lora:dropout=0.5", "down"), ("lora:dropout=0.5,dropout_on=hidden", "up")):
        change = changes(dyntune.tune(make_host(), spec).train())[0]
        inputs = []
        for linear in (change.down, change.up):
            linear.register_forward_pre_hook(lambda _, args, store=inputs: store.append(args[0]))
        change(torch.ones(1, 50, 32), torch.zeros(1, 50, 96))
        dropped = {name: bool((x == 0).any()) for name, x in zip(("down", "up"), inputs, strict=True)}
        assert dropped == {"down": seen == "down", "up": seen == "up"}


@pytest.mark.parametrize("options", [{"rank": 0}, {"dropout": 1.0}, {"targets": ()}, {"targets": ("q", "q")}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="lora: expected"):
        LoRA(**options)


def test_unknown_target_is_refused():
    with pytest.raises(SpecError, match="one of qkv, q, k"):
        LoRA(targets=("w",))
