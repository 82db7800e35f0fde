"""Tiny random hosts that every test file shares: one per kind of ViT of timm's that is supported."""

import gc
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from PIL import Image
from safetensors.torch import save_file
from timm.layers import SwiGLU, SwiGLUPacked
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import VisionTransformerRelPos
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone, families
from dyntune.parts.registry import registered
from dyntune.studies import compare

settings.register_profile("dyntune", deadline=None)  # a machine may be busy with other things
settings.load_profile("dyntune")
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
"""Kinds of VisionTransformer with the standard block."""
OTHERS = {
    "res_post": {"block_fn": ResPostBlock, "mlp_layer": GeGluMlp, "mlp_ratio": 2},
    "dinov3": {
        "img_size": (24, 40),
        "dynamic_img_size": True,
        "global_pool": "avg",
        "use_fc_norm": False,
        "init_values": 1e-5,
        "num_reg_tokens": 4,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "dinov3",
        "rope_temperature": 100,
        "rope_rotate_half": True,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
    },
    "eva02": {
        "qkv_fused": False,
        "mlp_ratio": 8 / 3,
        "swiglu_mlp": True,
        "scale_mlp": True,
        "scale_attn_inner": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (4, 4),
        "global_pool": "avg",
    },
    "mixed": {
        "attn_type": "rope",
        "global_pool": "token",
        "use_fc_norm": False,
        "init_values": 1e-5,
        "use_abs_pos_emb": False,
        "use_rot_pos_emb": True,
        "rope_type": "mixed",
        "rope_grid_indexing": "xy",
        "rope_temperature": 10,
    },
    "pe": {
        "img_size": (24, 40),
        "attn_type": "rope",
        "global_pool": "map",
        "use_pre_transformer_norm": True,
        "use_rot_pos_emb": True,
        "ref_feat_shape": (3, 5),
        "rope_grid_offset": 1,
        "rope_grid_indexing": "xy",
        "attn_pool_num_heads": 8,
        "attn_pool_mlp_ratio": 4,
        "norm_layer": partial(nn.LayerNorm, eps=1e-5),
    },
    "post_norm": {"use_post_norm": True, "use_rot_pos_emb": True, "global_pool": "token", "use_fc_norm": False},
    "naflex": {"global_pool": "map", "reg_tokens": 1, "pos_embed_grid_size": (4, 4), "init_values": 1e-5},
    "beit": {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 1e-5, "global_pool": "token"},
    "relpos": {"rel_pos_type": "bias", "shared_rel_pos": True, "img_size": (24, 40), "class_token": True},
}
"""Kinds with other blocks, rotary embeddings, or biases of relative positions."""
STAGES = {
    "img_size": 32,
    "patch_size": 4,
    "embed_dim": 16,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "window_size": 4,
    "num_classes": 5,
}
"""Two stages: 8 x 8 patches in four windows, which the second block shifts, and 4 x 4 cells of twice the width."""
STAGED = {"swin": SwinTransformer, "swinv2": SwinTransformerV2}
"""Classes of kinds with stages."""
FAMILIES = {
    **STAGED,
    "distilled": VisionTransformerDistilled,
    **dict.fromkeys(("dinov3", "eva02", "mixed", "pe", "post_norm"), Eva),
    "naflex": NaFlexVit,
    "beit": Beit,
    "relpos": VisionTransformerRelPos,
}
"""Classes of those that are no plain VisionTransformer."""

default_cfgs = generate_default_cfgs(
    {
        "vit_two_blocks": {"input_size": (3, 32, 32), "classifier": "head"},
        "swin_two_stages": {"input_size": (3, 32, 32), "classifier": "head.fc"},
    }
)


@register_model
def vit_two_blocks(pretrained: bool = False, **kwargs: object) -> VisionTransformer:
    """The built-in backbone with the first two of its blocks alone, which is exported in a sixth of the time."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "vit_two_blocks", pretrained, **(shape | kwargs))


@register_model
def swin_two_stages(pretrained: bool = False, **kwargs: object) -> SwinTransformer:
    """The tiny Swin by name."""
    return build_model_with_cfg(SwinTransformer, "swin_two_stages", pretrained, **(STAGES | kwargs))


def _randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Fills parameters and surrogates with non-zero random values under which activations stay of the order of 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        surrogates = ((name, buffer) for name, buffer in module.named_buffers() if ".surrogate." in name)
        for name, parameter in (*sorted(module.named_parameters()), *sorted(surrogates)):
            fan_in = parameter[0].numel() if parameter.ndim > 1 and parameter.shape[0] > 1 else 4
            values = torch.randn(parameter.shape, generator=generator) * fan_in**-0.5
            parameter.copy_(values + 1 if parameter.ndim < 2 and not name.endswith("bias") else values)
    return module


def _make_host(name: str = "plain", *, seed: int = 0, **changes: object) -> VisionTransformer:
    shape = STAGES if name in STAGED else SHAPE | (HOSTS | OTHERS)[name]
    return _randomise(FAMILIES.get(name, VisionTransformer)(**(shape | changes)), seed).eval()


def _images_for(host: VisionTransformer, batch: int, seed: int = 0) -> Tensor:
    size = host.patch_embed.img_size if hasattr(host, "patch_embed") else (SHAPE["img_size"],) * 2
    return torch.randn((batch, host.in_chans, *size), generator=torch.Generator().manual_seed(seed))


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--fuzz-cases`` and ``--misfortunes``: how often the suites of damage are tried."""
    parser.addoption(
        "--misfortunes", type=int, default=1, help="Kills, and full disks, that each command is tried with."
    )
    parser.addoption("--fuzz-cases", type=int, default=360, help="files to damage in tests/fuzz, of all kinds together")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """What a test draws from torch does not hang on the tests before it, but for fixtures that it shares with them."""
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_notes_at_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where backbones were built from is not noted for whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _imports_are_no_garbage() -> None:
    """Each full collection went through a million objects of libraries, which stay until the end anyway."""
    gc.collect()
    gc.freeze()


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
    """``randomise(module, seed=0)`` gives parameters, and surrogates, non-zero random values."""
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


TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "image_size": 32,
    "patch_size": 8,
}


def _make_hf(kind: str, **changes: object) -> nn.Module:
    """A tiny model of transformers, in evaluation, with the random values that its own initialisation gives."""
    import transformers as t

    tiny = {name: value for name, value in TINY.items() if name != "intermediate_size" or "dinov2" not in kind}
    if kind == "vit":
        host = t.ViTForImageClassification(t.ViTConfig(**tiny, num_labels=5, **changes))
    elif kind == "deit":
        host = t.DeiTForImageClassification(t.DeiTConfig(**tiny, num_labels=5, **changes))
    elif kind == "deit-distilled":
        host = t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**tiny, num_labels=5, **changes))
    elif kind == "dinov2":
        host = t.Dinov2ForImageClassification(t.Dinov2Config(**tiny, num_labels=5, **changes))
    elif kind == "dinov2-registers":
        host = t.Dinov2WithRegistersForImageClassification(
            t.Dinov2WithRegistersConfig(**tiny, num_labels=5, num_register_tokens=4, **changes)
        )
    elif kind == "dinov3":
        gated = {"intermediate_size": 96, "use_gated_mlp": True, "hidden_act": "silu", "num_register_tokens": 4}
        host = t.DINOv3ViTModel(t.DINOv3ViTConfig(**(tiny | gated | changes)))
    elif kind == "clip":
        host = t.CLIPForImageClassification(t.CLIPConfig(vision_config=tiny | changes, num_labels=5))
    elif kind == "clip-tower":
        host = t.CLIPVisionModel(t.CLIPVisionConfig(**tiny, **changes))
    elif kind == "siglip":
        host = t.SiglipForImageClassification(t.SiglipConfig(vision_config=tiny | changes, num_labels=5))
    elif kind == "siglip-tower":
        host = t.SiglipVisionModel(t.SiglipVisionConfig(**tiny, **changes))
    else:
        vision = {name: value for name, value in tiny.items() if name != "image_size"}
        host = t.Siglip2ForImageClassification(
            t.Siglip2Config(vision_config=vision | {"num_patches": 16} | changes, num_labels=5)
        )
    return host.eval()


@pytest.fixture(scope="session")
def make_hf() -> Callable[..., nn.Module]:
    """``make_hf(kind, **changes)``: a tiny model of transformers; changes are of its configuration."""
    pytest.importorskip("transformers")
    return _make_hf


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
    """The name of each kind of VisionTransformer with the standard block in turn."""
    return request.param


@pytest.fixture(scope="session", params=[*HOSTS, *OTHERS])
def any_host_name(request: pytest.FixtureRequest) -> str:
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
