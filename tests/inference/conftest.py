"""A small tuned model with gates, and the folders that it is exported to, made once."""

import os
import re
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

import dyntune
from dyntune.backbones.builtin import BUILTIN_BACKBONE
from dyntune.backbones.hosts import create_backbone
from dyntune.model.tuned import build_tuned

default_cfgs = generate_default_cfgs({"vit_two_blocks": {"input_size": (3, 32, 32), "classifier": "head"}})


@register_model
def vit_two_blocks(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """The built-in backbone with the first two of its blocks alone, which is exported in a sixth of the time."""
    shape = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 2, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, "vit_two_blocks", pretrained, **(shape | kwargs))


@pytest.fixture(scope="session")
def tuned(make_host, randomise):
    """Two blocks, three classes with names, and gates that are open for about half of the patches."""
    model = dyntune.tune(make_host(depth=2, num_classes=3), "dyt:rate=0.5")
    randomise(model.backbone.blocks, seed=3)
    model.classes = ("blue", "green", "red")
    return model.eval()


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A run that nobody has trained: two blocks of the built-in backbone with gates and a random head."""
    root = tmp_path_factory.mktemp("runs")
    whole = create_backbone(BUILTIN_BACKBONE).state_dict()
    save_file(
        {name: tensor for name, tensor in whole.items() if not re.match(r"blocks\.([2-9]|1\d)\.", name)},
        root / "two_blocks.safetensors",
    )
    torch.manual_seed(0)
    classes = ("blue", "green", "red")
    model = build_tuned("vit_two_blocks", "dyt:rate=0.5", classes=classes, weights=root / "two_blocks.safetensors")
    torch.nn.init.normal_(model.backbone.heads[0].weight, std=0.3)
    return model.save(root / "colours")


@pytest.fixture(scope="session")
def export(tuned):
    """The model traced with masks."""
    from dyntune.inference.export.bundle import Export

    return Export(tuned, masks=True)


@pytest.fixture(scope="session")
def some_images(tuned):
    """Images of the size that the model takes, ``(24, 3, height, width)``."""
    shape = (24, *tuned.backbone.image_shape)
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="session")
def exported(export, some_images, tmp_path_factory):
    """``exported(runtime, precision)``: a folder, to be read only."""
    from dyntune.inference.export.registry import lookup

    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "exported"  # once for all workers
    root.mkdir(exist_ok=True)

    def folder(runtime="onnx", precision="fp32"):
        packages = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf"), "torch": ()}
        for package in packages[runtime]:
            pytest.importorskip(package)
        path = root / f"{runtime}-{precision}"
        with FileLock(f"{path}.lock"):
            if not path.exists():
                export.write(path, lookup(runtime)(), precision, some_images)
        return path

    return folder
