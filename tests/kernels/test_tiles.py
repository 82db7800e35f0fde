"""The kernels that read the tokens, against plain PyTorch: odd sizes, none active, all active, one image."""

import pytest
import torch
import torch.nn.functional as F

from dyntune.inference.kernels.compaction import compact
from dyntune.inference.kernels.gathering import gather_norm
from dyntune.inference.kernels.joint import joint

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(given, expected, dtype):
    torch.testing.assert_close(given.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def random(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("batch", "count", "width", "hidden"), [(3, 11, 40, 10), (1, 1, 8, 2), (2, 50, 130, 19), (2, 3, 24, 140)]
)
def test_joint(device, dtype, batch, count, width, hidden):
    x, read, bias, write = (
        tensor.to(device, dtype)
        for tensor in (
            random(batch, count, width),
            random(hidden, width, seed=1, scale=width**-0.5),
            random(hidden, seed=2),
            random(hidden, width, seed=3, scale=hidden**-0.5),
        )
    )
    write[0] = 0
    values, out = joint(x, read, bias, write)
    products = F.linear(x.float(), read.float(), bias.float())
    assert values.dtype is torch.float32 and out.dtype is dtype
    # The kernel decides in fp32; a hidden layer too wide for it goes through products that round.
    torch.testing.assert_close(
        values, products[..., 0], **({"rtol": 1e-5, "atol": 1e-5} if hidden < 128 else {"rtol": 0.02, "atol": 0.02})
    )
    close(out, x.float() + products.relu() @ write.float(), dtype)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
@pytest.mark.parametrize(("batch", "patches", "prefix"), [(1, 1, 0), (1, 7, 1), (3, 16, 5), (5, 613, 1), (2, 1024, 0)])
def test_compaction(device, share, batch, patches, prefix):
    gate = (torch.rand(batch, patches, generator=torch.Generator().manual_seed(0)) < share).float().to(device)
    index, count = compact(gate, prefix)
    expected = torch.cat([gate.new_ones(batch, prefix), gate], dim=1).flatten().nonzero().squeeze(1)
    assert index.shape == (batch * (prefix + patches),) and count.shape == (1,)
    assert count.item() == len(expected)
    assert torch.equal(index[: len(expected)].long(), expected)


def test_compaction_reads_a_view(device):
    values = random(3, 12).to(device)
    gate = (values[:, 2:] > 0).to(torch.bfloat16)
    whole = torch.zeros(10, 6, dtype=torch.bfloat16, device=device)
    whole[:, ::2] = gate.T
    index, count = compact(whole[:, ::2].T, 2)
    dense, expected = compact(gate, 2)
    assert count.item() == expected.item()
    assert torch.equal(index[: count.item()], dense[: count.item()])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("tokens", "active", "width"), [(1, 1, 8), (29, 13, 40), (29, 0, 40), (29, 29, 40), (150, 149, 130)]
)
def test_gathered_norm(device, dtype, tokens, active, width):
    x = random(tokens, width).to(device, dtype) * 3 + 5
    weight, bias = random(width, seed=1).to(device, dtype), random(width, seed=2).to(device, dtype)
    index = torch.randperm(tokens, generator=torch.Generator().manual_seed(0)).int().to(device)
    count = torch.tensor([active], dtype=torch.int32, device=device)
    rows = gather_norm(x, index, count, weight, bias, 1e-6)
    expected = F.layer_norm(x.float(), (width,), weight.float(), bias.float(), 1e-6)[index[:active].long()]
    assert rows.shape == x.shape and rows.dtype is dtype
    close(rows[:active], expected, dtype)


def test_none_of_them_asks_the_device(device, nothing_comes_back):
    x = torch.ones(2, 5, 8, device=device)
    read = torch.ones(3, 8, device=device)
    with nothing_comes_back():
        values, out = joint(x, read, read[:, 0].contiguous(), read)
        index, count = compact(values[:, 1:], 1)
        gather_norm(out.flatten(0, 1), index, count, read[0], read[1], 1e-6)
