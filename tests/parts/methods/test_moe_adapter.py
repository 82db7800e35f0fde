"""The MoE-adapter against a loop over images, and the published counts."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.errors import BackboneError, SpecError
from dyntune.core.shapes import shapes_only
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.moe_adapter import MixedAdapter, MoeAdapter

DENSE_VIT_B = 17_581_972_224


def mixed(randomise, normalise="softmax", mix="weights", scale=0.6):
    return randomise(MixedAdapter(6, 3, 4, scale, 0.5, normalise, mix)).eval()


@pytest.fixture
def tokens():
    return Tokens(torch.randn(5, 7, 6, generator=torch.Generator().manual_seed(0)) + 0.5, 1, (2, 3))


def shares(adapter, x, normalise):
    scores = adapter.router.weight @ x.mean(0)
    return {"softmax": scores.softmax(0), "sigmoid": scores.sigmoid(), "none": scores}[normalise]


@pytest.mark.parametrize("normalise", ["softmax", "sigmoid", "none"])
@torch.no_grad()
def test_weights_are_mixed_for_each_image(randomise, tokens, normalise):
    adapter = mixed(randomise, normalise)
    out = adapter(tokens)
    for image, x in enumerate(tokens.x):
        alpha = shares(adapter, x, normalise)
        down = sum(a * w for a, w in zip(alpha, adapter.down_weight, strict=True))
        down_bias = sum(a * b for a, b in zip(alpha, adapter.down_bias, strict=True))
        up = sum(a * w for a, w in zip(alpha, adapter.up_weight, strict=True))
        up_bias = sum(a * b for a, b in zip(alpha, adapter.up_bias, strict=True))
        expected = 0.6 * (F.relu(x @ down.T + down_bias) @ up.T + up_bias)
        torch.testing.assert_close(out[image], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("normalise", ["softmax", "sigmoid", "none"])
@torch.no_grad()
def test_outputs_are_mixed_for_each_image(randomise, tokens, normalise):
    adapter = mixed(randomise, normalise, "outputs")
    out = adapter(tokens)
    for image, x in enumerate(tokens.x):
        expected = torch.zeros_like(x)
        for expert, share in enumerate(shares(adapter, x, normalise)):
            hidden = F.relu(x @ adapter.down_weight[expert].T + adapter.down_bias[expert])
            expected += share * 0.6 * (hidden @ adapter.up_weight[expert].T + adapter.up_bias[expert])
        torch.testing.assert_close(out[image], expected, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_modes_are_different_functions(randomise, tokens):
    results = [
        mixed(randomise, normalise, mix)(tokens)
        for normalise in ("softmax", "sigmoid", "none")
        for mix in ("weights", "outputs")
    ]
    for index, one in enumerate(results):
        for other in results[index + 1 :]:
            assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize("mix", ["weights", "outputs"])
@torch.no_grad()
def test_an_image_does_not_depend_on_the_others_of_its_batch(randomise, tokens, mix):
    adapter = mixed(randomise, mix=mix)
    together = adapter(tokens)
    alone = torch.cat([adapter(tokens.with_x(x[None])) for x in tokens.x])
    torch.testing.assert_close(together, alone)


@torch.no_grad()
def test_starts_as_the_identity_with_experts_of_their_own(make_host, images_for):
    host = make_host("registers")
    images = images_for(host, 2)
    expected = host(images)
    torch.manual_seed(0)
    model = dyntune.tune(host, "moe-adapter:experts=3,bottleneck=4").eval()
    torch.testing.assert_close(model(images), expected, atol=1e-6, rtol=1e-5)
    adapter = next(model.backbone.units("mlp")).parallel["moe_adapter"]
    for zero in (adapter.up_weight, adapter.up_bias, adapter.down_bias):
        assert zero.abs().max() == 0
    assert adapter.router.bias is None
    assert 0.005 < adapter.router.weight.std() < 0.04
    for index, expert in enumerate(adapter.down_weight):
        assert 0.8 / math.sqrt(32) < expert.abs().max() <= 1 / math.sqrt(32)
        assert all(not torch.equal(expert, other) for other in adapter.down_weight[index + 1 :])


@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_every_tensor_learns(randomise, tokens, mix):
    adapter = randomise(MixedAdapter(6, 3, 4, "learnable", 0.0, "softmax", mix))
    (adapter(tokens) ** 2).sum().backward()
    assert len(list(adapter.parameters())) == 6
    for name, parameter in adapter.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("experts,parameters", [(2, 2_397_696), (4, 4_795_392), (8, 9_590_784), (12, 14_386_176)])
def test_published_counts(experts, parameters):
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    model = dyntune.tune(host, f"moe-adapter:experts={experts},bottleneck=64")
    cost = dyntune.cost(model)
    assert cost.trainable_params == parameters
    mixing = experts * 2 * 768 * 64 + 768 * experts
    assert cost.macs == DENSE_VIT_B + 12 * (2 * 197 * 768 * 64 + mixing)


@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_closed_form_counts(make_host, mix):
    model = dyntune.tune(make_host(), f"moe-adapter:experts=3,bottleneck=5,where=attn-mlp,mix={mix}")
    cost = dyntune.cost(model)
    assert cost.trainable_params == 6 * (3 * (2 * 32 * 5 + 5 + 32) + 32 * 3)
    by_weights = 3 * 2 * 32 * 5 + 32 * 3 + 17 * 2 * 32 * 5
    by_outputs = 32 * 3 + 3 * 17 * 2 * 32 * 5 + 3 * 17 * 32
    assert cost.macs - cost.dense_macs == 6 * (by_weights if mix == "weights" else by_outputs)


def test_preset_of_one_expert_is_a_plain_adapter(make_host):
    plain, several = dyntune.tune(make_host(), "dyt"), dyntune.tune(make_host(), "dyt:experts=2,normalise=sigmoid")
    assert [part.name() for part in plain.methods] == ["adaptformer"]
    assert several.methods == (MoeAdapter(experts=2, normalise="sigmoid", scale=1.0),)


def test_one_expert_is_refused():
    with pytest.raises(SpecError, match="at least 2 experts"):
        MoeAdapter(experts=1)


def test_only_one_per_place(make_host):
    with pytest.raises(BackboneError, match="already installed"):
        dyntune.tune(make_host(), "moe-adapter", "moe-adapter")
