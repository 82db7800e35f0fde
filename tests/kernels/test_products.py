"""The products that read their row count on the device, against plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F
import triton
from packaging.version import Version

from dyntune.inference.kernels import grouped, product
from dyntune.inference.kernels.launch import capability

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [
    (1, 1, 8, 8),
    (29, 13, 40, 72),
    (29, 0, 40, 72),
    (29, 29, 24, 40),
    (29, 13, 48, 64),
    (70, 48, 40, 65),
    (70, 49, 33, 64),
]
ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def random(*shape, device, dtype, seed=0, scale=1.0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(device, dtype)


def close(given, expected, dtype):
    torch.testing.assert_close(given.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


class Case:
    """Rows, weights and positions of one product; what lies behind the active rows is not a number."""

    def __init__(self, device, dtype, tokens, active, depth, columns):
        self.active = active
        self.rows = random(tokens, depth, device=device, dtype=dtype)
        self.rows[active:] = torch.nan
        self.weight = random(columns, depth, device=device, dtype=dtype, seed=1, scale=depth**-0.5)
        self.bias = random(columns, device=device, dtype=dtype, seed=2)
        self.index = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).int().to(device)
        self.count = torch.tensor([active], dtype=torch.int32, device=device)
        self.out = random(tokens, columns, device=device, dtype=dtype, seed=3)
        self.linear = F.linear(self.rows[:active].float(), self.weight.float(), self.bias.float())

    @property
    def summed(self):
        return self.out.float().index_add(0, self.index[: self.active].long(), self.linear)


def aligned(shape):
    return all(size % 8 == 0 for size in shape[2:])


# Tensor descriptors exist for rows of whole 16 bytes, and on a GPU from Hopper on.
HOWS = [(shape, described) for shape in SHAPES for described in (False, True) if not described or aligned(shape)]


def skip_without_descriptors(device, described, shape):
    if not described:
        return
    if device.type == "cuda" and capability(device)[0] < 9:
        pytest.skip("this GPU has no copy engine for tiles")
    if device.type == "cpu" and Version(triton.__version__) < Version("3.6") and any(size % 16 for size in shape[2:]):
        pytest.skip("Triton's interpreter before 3.6 takes strides in elements for strides in bytes")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "described"), HOWS)
def test_activated(device, dtype, shape, described):
    skip_without_descriptors(device, described, shape)
    case = Case(device, dtype, *shape)
    out = product.activated(case.rows, case.count, case.weight, case.bias, "gelu", descriptors=described)
    assert out.shape == case.out.shape and out.dtype is dtype
    close(out[: case.active], F.gelu(case.linear), dtype)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(device, name):
    case = Case(device, torch.float32, 29, 13, 40, 72)
    out = product.activated(case.rows, case.count, case.weight, 4 * case.bias, name)
    close(out[:13], ACTIVATIONS[name](case.linear + 3 * case.bias), torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "described"), HOWS)
def test_scattered(device, dtype, shape, described):
    skip_without_descriptors(device, described, shape)
    case = Case(device, dtype, *shape)
    out = case.out.clone()
    product.scattered_(out, case.rows, case.index, case.count, case.weight, case.bias, descriptors=described)
    close(out, case.summed, dtype)
    skipped = case.index[case.active :].long()
    assert torch.equal(out[skipped], case.out[skipped])


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if aligned(shape)])
def test_grouped_product(device, shape):
    refusal = grouped.refusal(device, torch.bfloat16)
    if refusal:
        pytest.skip(refusal)
    case = Case(device, torch.bfloat16, *shape)
    hidden = grouped.activated(case.rows, case.count, case.weight, case.bias, "gelu")
    close(hidden[: case.active], F.gelu(case.linear), torch.bfloat16)
    out = case.out.clone()
    grouped.scattered_(out, case.rows, case.index, case.count, case.weight, case.bias)
    close(out, case.summed, torch.bfloat16)


def test_grouped_product_of_another_type_or_width_is_refused(device):
    assert "bf16" in grouped.refusal(device, torch.float16)
    assert "multiples of 8; given 40 and 65" in grouped.refusal(device, torch.bfloat16, 40, 65)


def test_neither_asks_the_device(device, nothing_comes_back):
    rows, weight, bias = (torch.ones(shape, device=device) for shape in ((5, 8), (16, 8), (16,)))
    count = torch.full((1,), 3, dtype=torch.int32, device=device)
    index = torch.arange(5, dtype=torch.int32, device=device)
    back = weight.T.contiguous()
    with nothing_comes_back():
        hidden = product.activated(rows, count, weight, bias, "gelu")
        product.scattered_(rows, hidden, index, count, back, bias[:8])
