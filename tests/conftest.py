"""Tiny random hosts that every test file shares: one per kind of timm ViT that is supported."""

import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone, families
from dyntune.parts.registry import registered
from dyntune.studies import compare

SHAPE = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
HOSTS = {
    "plain": {},
    "deit3": {"no_embed_class": True, "init_values": 1e-6},
    "registers": {"no_embed_class": True, "init_values": 1e-5, "reg_tokens": 4},
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "siglip": {"class_token": False, "global_pool": "map"},
    "average": {"global_pool": "avg"},
    "qk_norm": {"qk_norm": True, "scale_attn_norm": True, "qkv_bias": False, "proj_bias": False},
    "swiglu": {"mlp_layer": SwiGLU},
    "swiglu_packed": {"mlp_layer": SwiGLUPacked, "init_values": 1e-5},
    "oblong": {"img_size": (24, 40)},
    "distilled": {},
}

default_cfgs = generate_default_cfgs({"vit_two_blocks": {"input_size": (3, 32, 32), "classifier": "head"}})


@register_model
def vit_two_blocks(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """The built-in backbone with the first two of its blocks alone, which is exported in a sixth of the time."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "vit_two_blocks", pretrained, **(shape | kwargs))


def _randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills every parameter with non-zero random values under which activations stay of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(module.named_parameters()):
            fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 4
            values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            parameter.copy_(values + 1 if parameter.ndim < 2 and not name.endswith("bias") else values)
    return module


def _make_host(name: str = "plain", *, seed: int = 0, **changes: object) -> VisionTransformer:
    family = VisionTransformerDistilled if name == "distilled" else VisionTransformer
    return _randomise(family(**(SHAPE | HOSTS[name] | changes)), seed).eval()


def _images_for(host: VisionTransformer, batch: int, seed: int = 0) -> Tensor:
    shape = (batch, host.in_chans, *host.patch_embed.img_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_waiting_for_the_disk() -> Iterator[None]:
    """What tests write need not survive a power failure, and waiting for that took longer than many a training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _short_timing() -> Iterator[None]:
    """Speeds beside the dense model, which commands report for seconds of timing, come from one call of each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "measure_throughput", partial(compare.measure_throughput, rounds=1, seconds=0))
        yield


@pytest.fixture(scope="session")
def randomise() -> Callable[..., nn.Module]:
    """``randomise(module, seed=0)`` gives every parameter non-zero random values."""
    return _randomise


@pytest.fixture(scope="session")
def make_host() -> Callable[..., VisionTransformer]:
    """``make_host(name, seed=0, **changes)``: equal arguments give equal weights."""
    return _make_host


@pytest.fixture(scope="session")
def images_for() -> Callable[..., Tensor]:
    """``images_for(host, batch, seed=0)`` gives random images of the size that the host takes."""
    return _images_for


@pytest.fixture(scope="session")
def two_blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weight file of ``vit_two_blocks``."""
    file = tmp_path_factory.mktemp("weights") / "two_blocks.safetensors"
    whole = create_backbone(BUILTIN_BACKBONE).state_dict()
    save_file({name: t for name, t in whole.items() if not re.match(r"blocks\.([2-9]|1\d)\.", name)}, file)
    return file


@pytest.fixture
def outside(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of another distribution, whose entry points add parts and hosts as long as the fixture lasts."""
    folder = Path(__file__).parent / "outside"
    monkeypatch.syspath_prepend(folder)
    for known in (registered, families):
        known.cache_clear()
    yield folder
    monkeypatch.undo()
    for known in (registered, families):
        known.cache_clear()


@pytest.fixture(scope="session", params=HOSTS)
def host_name(request: pytest.FixtureRequest) -> str:
    """The name of each kind of host in turn."""
    return request.param


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small noisy pictures, three classes named by their colour: 12, 4 and 4 of each in three splits."""
    root = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for label, colour in enumerate(("blue", "green", "red")):
            (root / split / colour).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 100, (20, 20, 3), dtype=np.uint8)
                pixels[..., 2 - label] += 150
                Image.fromarray(pixels).save(root / split / colour / f"{index}.png")
    return root
