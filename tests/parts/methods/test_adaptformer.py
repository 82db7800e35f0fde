"""AdaptFormer against its equation and the published counts."""

import math

import pytest
import timm
import torch

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.adaptformer import Adapter, AdaptFormer

DENSE_VIT_B = 17_581_972_224


def vit_base(classes=100):
    with shapes_only():
        return timm.create_model("vit_base_patch16_224", num_classes=classes)


@pytest.mark.parametrize(
    "bottleneck,parameters,macs", [(8, 156_768, 17_611_021_056), (64, 1_189_632, DENSE_VIT_B + 12 * 2 * 197 * 768 * 64)]
)
def test_published_counts(bottleneck, parameters, macs):
    cost = dyntune.cost(dyntune.tune(vit_base(), f"adaptformer:bottleneck={bottleneck}"))
    assert (cost.trainable_params, cost.macs, cost.dense_macs) == (parameters, macs, DENSE_VIT_B)
    assert cost.head_params == 76_900
    assert cost.total_params == 85_798_656 + parameters + cost.head_params


def test_without_biases_as_in_petl_vit(make_host, randomise, images_for):
    assert dyntune.cost(dyntune.tune(vit_base(), "adaptformer:bias=false")).trainable_params == 147_456
    adapter = Adapter(6, 3, 0.5, 0.0, bias=False)
    randomise(adapter)
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    expected = 0.5 * (x @ adapter.down_proj.weight.T).relu() @ adapter.up_proj.weight.T
    torch.testing.assert_close(adapter(Tokens(x, 0, (1, 2))), expected)
    adapter.fold_scale()
    torch.testing.assert_close(adapter(Tokens(x, 0, (1, 2))), expected)


@pytest.mark.parametrize("where,places", [("mlp", 3), ("attn", 3), ("attn-mlp", 6), ("layer", 3)])
@pytest.mark.parametrize("bottleneck", [1, 5])
def test_closed_form_counts(make_host, where, places, bottleneck):
    model = dyntune.tune(make_host(), f"adaptformer:where={where},bottleneck={bottleneck}")
    cost = dyntune.cost(model)
    assert cost.trainable_params == places * (2 * 32 * bottleneck + bottleneck + 32)
    assert cost.macs - cost.dense_macs == places * 17 * 2 * 32 * bottleneck


def test_each_output_is_that_of_the_equation_token_by_token(randomise):
    adapter = randomise(Adapter(6, 3, 0.4, 0.5)).eval()
    x = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    out = adapter(Tokens(x, 1, (2, 2)))
    for image in range(2):
        for token in range(5):
            hidden = [
                max(0.0, sum(w * v for w, v in zip(row, x[image, token].tolist(), strict=True)) + bias)
                for row, bias in zip(adapter.down_proj.weight.tolist(), adapter.down_proj.bias.tolist(), strict=True)
            ]
            expected = [
                0.4 * (sum(w * h for w, h in zip(row, hidden, strict=True)) + bias)
                for row, bias in zip(adapter.up_proj.weight.tolist(), adapter.up_proj.bias.tolist(), strict=True)
            ]
            assert out[image, token].tolist() == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_adapter_stands_beside_the_mlp_and_reads_the_stream_after_attention(make_host, randomise, images_for):
    host = make_host("registers")
    images = images_for(host, 2)
    expected = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    model = randomise(dyntune.tune(host, "adaptformer:scale=0.3"), 4).eval()
    expected = host.norm_pre(host._pos_embed(host.patch_embed(images)))
    for unit, block in zip(model.backbone.blocks, host.blocks, strict=True):
        z = expected + block.ls1(block.attn(block.norm1(expected)))
        adapter = unit.mlp.parallel["adapter"]
        bypass = 0.3 * adapter.up_proj(adapter.down_proj(z).relu())
        expected = z + block.ls2(block.mlp(block.norm2(z))) + bypass
    torch.testing.assert_close(model(images), host.head(host.norm(expected)[:, 0]), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_starts_as_the_identity_with_trainable_scale(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "adaptformer:scale=learnable,bottleneck=4").eval()
    assert torch.equal(model(images), model.run(images, complete=True).logits)
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    for unit in model.backbone.units("mlp"):
        adapter = unit.parallel["adapter"]
        assert adapter.scale.item() == 1
        assert adapter.scale.requires_grad
        assert (
            adapter.up_proj.weight.abs().max()
            == adapter.up_proj.bias.abs().max()
            == adapter.down_proj.bias.abs().max()
            == 0
        )
        assert 0.8 / math.sqrt(32) < adapter.down_proj.weight.abs().max() <= 1 / math.sqrt(32)
    assert dyntune.cost(model).trainable_params == 3 * (2 * 32 * 4 + 4 + 32 + 1)


def test_learnable_scale_multiplies_and_learns(randomise):
    adapter = Adapter(6, 3, "learnable", 0.0)
    fixed = Adapter(6, 3, 2.5, 0.0)
    randomise(adapter)
    tokens = Tokens(torch.randn(1, 4, 6, generator=torch.Generator().manual_seed(0)), 1, (1, 3))
    with torch.no_grad():
        adapter.scale.fill_(2.5)
    fixed.load_state_dict({name: value for name, value in adapter.state_dict().items() if name != "scale"})
    out = adapter(tokens)
    torch.testing.assert_close(out, fixed(tokens))
    out.sum().backward()
    torch.testing.assert_close(adapter.scale.grad, out.detach().sum() / 2.5)
    assert "scale" not in dict(fixed.named_parameters())


def test_dropout_acts_on_the_hidden_values_while_training(randomise):
    adapter = randomise(Adapter(4, 1000, 1.0, 0.25)).train()
    seen = []
    adapter.up_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = Tokens(torch.ones(1, 1, 4), 0, (1, 1))
    torch.manual_seed(0)
    adapter(tokens)
    adapter.eval()(tokens)
    dropped, whole = seen
    positive = whole > 0
    assert (dropped[positive] == 0).float().mean().item() == pytest.approx(0.25, abs=0.06)
    kept = positive & (dropped > 0)
    torch.testing.assert_close(dropped[kept], whole[kept] / 0.75)


def test_only_one_adapter_per_place(make_host):
    with pytest.raises(BackboneError, match=r"adapter is already installed at blocks\.0\.mlp"):
        dyntune.tune(make_host(), "dyt", "adaptformer")
    dyntune.tune(make_host(), "dyt", "adaptformer:where=attn")


@pytest.mark.parametrize("options", [{"bottleneck": 0}, {"dropout": 1.0}, {"dropout": -0.1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(SpecError, match="adaptformer: expected"):
        AdaptFormer(**options)
