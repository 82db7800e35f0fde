"""The gradients of attention with hidden tokens, against differences of its formula."""

import itertools

import pytest
import torch

from dyntune.backbones.hosts import wrap
from dyntune.core.attention import attend, bias_of
from dyntune.core.tokens import Projected, Provenance, Tokens


@pytest.mark.parametrize("sharpness", [1.0, 8.0, 40.0])
def test_gradients_of_the_masked_softmax_are_those_of_its_formula(sharpness):
    """A hidden patch may hold a row's maximum, which epsilon keeps from cancelling."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, 6, 2, 3)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    q, k = q * sharpness**0.5, k * sharpness**0.5
    # The class token's strongest key is a hidden patch.
    k[:, 2] = 4 * q[:, 0] / q[:, 0].norm(dim=-1, keepdim=True)
    present = torch.tensor([[1.0, 0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0, 0.0]], dtype=torch.float64)

    inputs = [tensor.requires_grad_() for tensor in (q, k, v, present)]

    def attended(q, k, v, present):
        tokens = Tokens(torch.zeros(2, 6, 6), 1, (1, 5), provenance=Provenance(present=present))
        return attend(Projected(q, k, v, k), tokens).square().sum()

    def formula(q, k, v, present):
        total = torch.zeros((), dtype=torch.float64)
        for image, head, row in itertools.product(range(2), range(2), range(6)):
            logits = k[image, :, head] @ q[image, row, head] * 3**-0.5
            seen = torch.cat([torch.ones(1, dtype=torch.float64), present[image]])
            seen = torch.where(torch.arange(6) == row, 1.0, seen)
            strengths = (logits - logits[logits.argmax()]).exp() * seen
            shares = (strengths + 1e-6 / 6) / (strengths.sum() + 1e-6)
            total = total + (shares @ v[image, :, head]).square().sum()
        return total

    torch.testing.assert_close(attended(*inputs), formula(*inputs))
    found, expected = (torch.autograd.grad(made(*inputs), inputs) for made in (attended, formula))
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)
    # And the formula's derivative is what it says: a small step along each gradient.
    for number, slope in enumerate(expected[:2]):
        step = 1e-7 / slope.norm()
        ends = [[*inputs[:number], inputs[number] + way * step * slope, *inputs[number + 1 :]] for way in (1, -1)]
        rise = (attended(*ends[0]) - attended(*ends[1])) / (2 * step)
        assert rise.item() == pytest.approx(slope.square().sum().item(), rel=1e-4)


def test_a_weight_of_zero_has_a_gradient_and_no_share():
    """softmax(logits + log w) is ``w E / sum w E``, whose derivative at w = 0 is not 0."""
    generator = torch.Generator().manual_seed(0)
    logits, values = torch.randn(4, 7, generator=generator), torch.randn(4, 7, generator=generator)
    weights = torch.tensor([1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 1.0]).requires_grad_()
    shares = (logits + bias_of(weights, torch.float32)).softmax(-1)
    expected = weights * logits.exp() / (weights * logits.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(shares, expected)
    found, wanted = (torch.autograd.grad((made * values).sum(), weights)[0] for made in (shares, expected))
    torch.testing.assert_close(found, wanted)
    assert wanted[weights.detach() == 0].abs().min() > 1e-3


@pytest.mark.parametrize("name,changes", [("plain", {"global_pool": "map"}), ("siglip", {})])
def test_attention_pooling_tells_a_hidden_patch_what_it_would_bring(make_host, randomise, images_for, name, changes):
    host = randomise(make_host(name, **changes), seed=1).double()
    backbone = wrap(host).eval()
    tokens = backbone.finish(backbone.embed(images_for(host, 1).double()))
    present = torch.ones(1, tokens.patches.shape[1], dtype=torch.float64)
    present[:, ::2] = 0

    def read(present):
        return backbone.readout(tokens.with_present(present)).square().sum()

    gradient = torch.autograd.grad(read(present.requires_grad_()), present)[0][0]
    step = 1e-6
    with torch.no_grad():
        for patch in (0, 1, 2):
            moved = present.clone()
            moved[0, patch] += step
            assert gradient[patch].item() == pytest.approx((read(moved) - read(present)).item() / step, rel=1e-3)
    assert gradient[::2].abs().max() > 1e-4
