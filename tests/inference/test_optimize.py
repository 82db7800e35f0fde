"""Exact optimisations: an optimised model computes what the model computes, with fewer operations."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dyntune
from dyntune.core.errors import BackboneError, DyntuneError
from dyntune.inference import folded_copy
from dyntune.inference.packed import PackedLinear, available
from dyntune.parts.registry import registered

SPECS = [
    "linear",
    "dyt",
    "dyt:dispatch=attn",
    "dyt:dispatch=attn-mlp",
    "dyt:dispatch=layer",
    "dyt:experts=2",
    "dyt+tome:r=2",
    "adaptformer:bias=false+dispatch",
    "adaptformer:where=attn+dispatch:where=attn-mlp",
    "adaptformer+dispatch:where=layer",
    "adapter+dispatch",
    "lora+vpt+dispatch",
    "convpass+dispatch",
    "ssf+tome:r=3",
    "adaptformer+evit:layers=1/2",
    "adaptformer+dynamicvit:keep=0.8/0.5,layers=1/2",
    "fact-tt+pyra:r=3/2/1",
]


def filled(host, spec, seed=0):
    """A tuned model with nothing zero in trained tensors and surrogates, whose gates open for some patches."""
    model = dyntune.tune(host, spec)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        surrogates = {name: buffer for name, buffer in model.named_buffers() if ".surrogate." in name}
        for name, tensor in (model.tuned_state() | surrogates).items():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * (0.5 if "dispatcher" in name else 0.1))
    return model.eval()


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def macs(model, images):
    with dyntune.MacCounter() as counter, torch.no_grad():
        model(images)
    return counter.macs / len(images)


@pytest.mark.parametrize("spec", SPECS)
@torch.no_grad()
def test_logits_and_gates_are_those_of_the_model(make_host, images_for, spec):
    model = filled(make_host("registers"), spec)
    images = images_for(model.backbone.host, 3)
    expected = model.run(images)
    before = {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}
    assert_same(dyntune.optimize(model)(images), expected.logits)
    found = dyntune.optimize(model, masks=True).run(images)
    assert_same(found.logits, expected.logits)
    assert [gate.unit for gate in found.gates] == [gate.unit for gate in expected.gates]
    assert all(torch.equal(a.values, b.values) for a, b in zip(found.gates, expected.gates, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.backbone.state_dict().items())
    assert_same(model(images), expected.logits)


@pytest.mark.parametrize("name", sorted(name for name, part in registered().items() if name != "res-tuning-bypass"))
@torch.no_grad()
def test_every_part_can_be_optimized(make_host, images_for, name):
    host = make_host(depth=6)  # pyra and fpet have their place in the middle
    spec = {"dynamicvit": "dynamicvit:keep=0.5,layers=2", "evit": "evit:layers=2", "noah": "noah"}.get(name, name)
    model = filled(host, spec)
    images = images_for(host, 2)
    assert_same(dyntune.optimize(model)(images), model(images))


@torch.no_grad()
def test_every_host_can_be_optimized(make_host, images_for, host_name):
    model = filled(make_host(host_name), "dyt")
    images = images_for(model.backbone.host, 2)
    assert_same(dyntune.optimize(model)(images), model(images))


@torch.no_grad()
def test_a_bypass_can_be_optimized(make_host, images_for):
    model = filled(make_host(), "res-tuning-bypass")
    images = images_for(model.backbone.host, 2)
    optimized = dyntune.optimize(model)
    assert_same(optimized(images), model(images))
    assert any("the head reads the patches" in note for note in optimized.notes)


@pytest.mark.parametrize("bias", [-1000.0, 1000.0], ids=["none", "all"])
@pytest.mark.parametrize("variant", ["mlp", "attn", "attn-mlp", "layer"])
@pytest.mark.parametrize("name", ["plain", "siglip"])
@torch.no_grad()
def test_images_that_activate_nothing_or_everything(make_host, images_for, name, variant, bias):
    model = filled(make_host(name), f"dyt:dispatch={variant}")
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("dispatcher.gate.bias"):
            parameter.fill_(bias)
    images = images_for(model.backbone.host, 2)
    output = dyntune.optimize(model, masks=True).run(images)
    assert all(gate.values.eq(float(bias > 0)).all() for gate in output.gates)
    assert_same(output.logits, model(images))


@torch.no_grad()
def test_the_last_block_computes_the_class_token_alone(make_host, images_for):
    host = make_host(depth=3)
    images = images_for(host, 2)
    optimized = dyntune.optimize(host)
    width, tokens = host.embed_dim, host.patch_embed.num_patches + 1
    queries_and_projection = 2 * width * width
    attention = 2 * tokens * width
    mlp = 2 * width * host.blocks[0].mlp.fc1.out_features
    norm = 2 * 5 * width  # the second norm of the block and the last one
    saved = (tokens - 1) * (queries_and_projection + attention + mlp + norm)
    assert macs(host, images) - macs(optimized, images) == saved
    assert_same(optimized(images), host(images))


@torch.no_grad()
def test_a_distilled_model_keeps_both_tokens_that_its_heads_read(make_host, images_for):
    host = make_host("distilled")
    optimized = dyntune.optimize(host)
    assert any("the last block computes 2 tokens alone" in note for note in optimized.notes)
    assert_same(optimized(images_for(host, 2)), host(images_for(host, 2)))


@pytest.mark.parametrize("spec,reason", [("convpass", "looks at all tokens"), ("dyt:dispatch=layer", "as a whole")])
def test_notes_say_why_the_last_block_computes_everything(make_host, spec, reason):
    assert any(reason in note for note in dyntune.optimize(filled(make_host(), spec)).notes)


def test_a_head_that_reads_patches_keeps_them(make_host):
    assert any("the head reads the patches" in note for note in dyntune.optimize(make_host("average")).notes)


@torch.no_grad()
def test_gate_and_adapter_are_one_product(make_host, images_for):
    model = filled(make_host(), "dyt:bottleneck=3,scale=0.1,surrogate=0.2")
    optimized = folded_copy(model, masks=True)
    joint = optimized.joints["blocks_1_mlp"]
    width = model.backbone.host.embed_dim
    assert joint.read.weight.shape == (3 + 2 + round(0.2 * width) + 1, width)
    x = torch.randn(2, 7, width)
    mask = (torch.arange(14) % 3 == 0).float().view(2, 7)
    read = joint(x)
    unit = model.backbone.blocks[1].mlp
    adapter = unit.parallel["adapter"]
    hidden = torch.relu(x @ adapter.down_proj.weight.T + adapter.down_proj.bias)
    update = 0.1 * (hidden @ adapter.up_proj.weight.T + adapter.up_proj.bias)
    assert unit.surrogate.up.any()
    assert_same(joint.written(x, read, mask), x + update + unit.surrogate(x, 1 - mask))
    assert_same(read[..., 0], unit.dispatcher.gate(x).squeeze(-1))
    assert not optimized.backbone.blocks[1].mlp.parallel and optimized.backbone.blocks[1].mlp.surrogate is None


@torch.no_grad()
def test_layer_scale_becomes_part_of_the_weights(make_host, images_for):
    host = make_host("registers", init_values=0.3)
    optimized = folded_copy(host)
    assert all(isinstance(block.ls2, nn.Identity) for block in optimized.backbone.host.blocks)
    assert all(not isinstance(block.ls2, nn.Identity) for block in host.blocks)
    assert_same(optimized(images_for(host, 2)), host(images_for(host, 2)))


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_packed_weights_give_the_same_product(bias):
    linear = nn.Linear(24, 40, bias)
    packed = PackedLinear(linear)
    for shape in ((5, 24), (2, 3, 24), (0, 24), (1, 24)):
        x = torch.randn(shape)
        assert_same(packed(x), linear(x))
        with dyntune.MacCounter() as counter:
            packed(x)
        assert counter.macs == x.numel() * 40


def test_weights_in_other_precisions_are_not_packed(make_host):
    optimized = dyntune.optimize(make_host().bfloat16())
    assert any("not packed" in note for note in optimized.notes)
    assert not any(isinstance(module, PackedLinear) for module in optimized.modules())


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("spec", [*SPECS, "noah"])
@torch.no_grad()
def test_packed_models_give_the_same_logits(make_host, images_for, monkeypatch, spec):
    monkeypatch.setattr("dyntune.inference.packed._speedup", lambda *_: 2.0)
    model = filled(make_host("registers"), spec)
    images = images_for(model.backbone.host, 3)
    optimized = dyntune.optimize(model)
    assert sum(isinstance(module, PackedLinear) for module in optimized.modules()) >= 12
    assert_same(optimized(images), model(images))
    logits = optimized(images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(optimized(images), logits)


@torch.no_grad()
def test_a_bfloat16_model_is_optimized_in_bfloat16(make_host, images_for):
    model = filled(make_host(), "adaptformer").bfloat16()
    images = images_for(model.backbone.host, 2).bfloat16()
    torch.testing.assert_close(dyntune.optimize(model)(images), model(images), atol=0.1, rtol=0.1)


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
@torch.no_grad()
def test_products_in_bfloat16_leave_gates_and_adapters_in_float32(make_host, images_for, monkeypatch):
    model = filled(make_host(), "dyt")
    images = images_for(model.backbone.host, 2)
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        optimized = dyntune.optimize(model, precision="bf16")
        dtypes = {name: m.packed.dtype for name, m in optimized.named_modules() if isinstance(m, PackedLinear)}
        assert dtypes["backbone.host.blocks.0.mlp.fc1"] is torch.bfloat16
        assert dtypes["joints.blocks_0_mlp.read"] is torch.float32
        assert "backbone.host.head" not in dtypes and optimized.backbone.classes == 5
        logits = optimized(images)
        assert logits.dtype is torch.float32
        torch.testing.assert_close(logits, model(images), atol=0.1, rtol=0.1)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    with pytest.raises(DyntuneError, match="AVX512_BF16"):
        dyntune.optimize(model, precision="bf16")
    with pytest.raises(DyntuneError, match="fp32, bf16; given 'int8'"):
        dyntune.optimize(model, precision="int8")


def test_an_optimized_model_is_not_trained(make_host, images_for):
    optimized = dyntune.optimize(filled(make_host(), "dyt"))
    assert not any(p.requires_grad for p in optimized.parameters())
    assert not optimized(images_for(optimized.backbone.host, 1)).requires_grad
    assert optimized.eval() is optimized
    with pytest.raises(DyntuneError, match="for inference"):
        optimized.train()


def test_what_cannot_be_optimized_is_refused():
    with pytest.raises(BackboneError, match="not supported"):
        dyntune.optimize(nn.Linear(2, 2))


@torch.no_grad()
def test_a_merged_model_can_be_optimized(make_host, images_for):
    model = filled(make_host(), "lora+dyt")
    images = images_for(model.backbone.host, 2)
    expected = model(images)
    merged = copy.deepcopy(model)
    merged.merge()
    assert_same(dyntune.optimize(merged)(images), expected)
    assert_same(dyntune.optimize(model)(images), expected)


@torch.no_grad()
def test_the_rate_of_an_optimized_model_can_be_chosen(make_host, images_for):
    model = filled(make_host(), "dyt")
    images = images_for(model.backbone.host, 16)
    model.calibration = dyntune.calibrate(model, images, (0.3, 0.7))
    optimized = dyntune.optimize(model, masks=True)
    for rate in (0.3, 0.7, 1.0, None):
        optimized.set_rate(rate)
        model.set_rate(rate)
        assert_same(optimized(images), model(images))
    model.set_rate(0.3)
    assert_same(dyntune.optimize(model)(images), model(images))
    expected = model(images)
    model.set_rate(None)
    assert_same(dyntune.optimize(model, rate=0.3)(images), expected)


def test_an_optimized_model_stays_where_it_is(make_host):
    with pytest.raises(DyntuneError, match="optimize it there"):
        dyntune.optimize(make_host()).to(torch.float64)


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_are_not_copied():
    with pytest.raises(DyntuneError, match="optimize the model again"):
        copy.deepcopy(PackedLinear(nn.Linear(2, 2)))


@pytest.mark.skipif(not available(), reason="this PyTorch has no oneDNN")
def test_packed_weights_are_not_saved_without_a_word():
    packed = nn.Sequential(PackedLinear(nn.Linear(2, 2)))
    for save in (packed.state_dict, lambda: pickle.dumps(packed)):
        with pytest.raises(DyntuneError, match=r"cannot be saved, .*model\.save\(FOLDER\)"):
            save()


def test_what_is_wrapped_or_optimized_already_is_not_optimized(make_host):
    model = dyntune.tune(make_host(), "dyt")
    with pytest.raises(DyntuneError, match="given DataParallel"):
        dyntune.optimize(nn.DataParallel(model))
    with pytest.raises(DyntuneError, match="compiled already"):
        dyntune.optimize(torch.compile(model))
    with pytest.raises(DyntuneError, match="is optimised already"):
        dyntune.optimize(dyntune.optimize(model))


@torch.no_grad()
def test_a_host_that_reads_its_tokens_in_its_own_way_keeps_all_of_them(make_host, images_for):
    host = make_host()
    host.pool = lambda x: x.mean(1)
    images = images_for(host, 2)
    assert_same(dyntune.optimize(host)(images), host(images))
