"""The deterministic model and images on which the logits of public code were recorded."""

import re
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer


def tensor(name, shape):
    """The recorded tensor called ``name``: a hash of each flat index, mapped to the range of that kind of tensor."""
    h = (np.arange(1, np.prod(shape) + 1, dtype=np.uint64) * 0x9E3779B1 + zlib.crc32(name.encode())) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    u = 2 * h.astype(np.float64) / 2**32 - 1
    if name in ("cls_token", "pos_embed") or name.endswith(("pyra_a", "pyra_b")):
        u = 0.5 * u
    elif len(shape) == 1:
        u = 1 + 0.2 * u if name.endswith("weight") else 0.1 * u
    elif name != "input":
        u = 2 * u / np.prod(shape[1:]) ** 0.5
    return torch.from_numpy(u.astype(np.float32)).reshape(shape)


@torch.no_grad()
def host():
    """The recorded plain ViT: 224 px, patches of 16, width 64, 12 blocks, 4 heads, 10 classes."""
    model = VisionTransformer(embed_dim=64, depth=12, num_heads=4, num_classes=10).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(tensor(name, parameter.shape))
    return model


@torch.no_grad()
def fill(module, prefix="", names=None):
    """Gives every parameter of ``module`` the recorded value of its public name.

    Args:
        prefix: of every name.
        names: our names to public ones, as regular expressions.
    """
    for own, parameter in module.named_parameters():
        name = prefix + own
        for ours, theirs in (names or {}).items():
            name = re.sub(ours, theirs, name)
        parameter.copy_(tensor(name, parameter.shape))


def check(logits, line):
    """Compares logits ``(2, 10)`` with a recorded line: five of image 0, three of image 1, the sum of magnitudes."""
    numbers = [float(number) for number in line.split() if number != "|"]
    assert logits[0, :5].tolist() == pytest.approx(numbers[:5], abs=1e-4)
    assert logits[1, :3].tolist() == pytest.approx(numbers[5:8], abs=1e-4)
    assert logits.abs().sum().item() == pytest.approx(numbers[8], abs=1e-3)


@pytest.fixture(scope="session")
def recorded():
    """``recorded.host()``, ``.images``, ``.tensor(name, shape)``, ``.fill(module, prefix, names)``, ``.check(logits,
    line)``."""
    images = tensor("input", (2, 3, 224, 224))
    return SimpleNamespace(host=host, images=images, tensor=tensor, fill=fill, check=check)
