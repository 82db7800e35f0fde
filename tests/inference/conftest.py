"""A small tuned model with gates, and the folders that it is exported to, made once."""

import os

import pytest
import torch
from filelock import FileLock

import dyntune
from dyntune.model.tune import build_tuned


@pytest.fixture(scope="session")
def tuned(make_host, randomise):
    """Two blocks, three classes with names, and gates that are open for about half of the patches."""
    model = dyntune.tune(make_host(depth=2, num_classes=3), "dyt:rate=0.5")
    randomise(model.backbone.blocks, seed=3)
    model.classes = ("blue", "green", "red")
    return model.eval()


@pytest.fixture(scope="session")
def run(two_blocks, tmp_path_factory):
    """A run that nobody has trained: two blocks of the built-in backbone with gates and a random head."""
    torch.manual_seed(0)
    model = build_tuned("vit_two_blocks", "dyt:rate=0.5", classes=("blue", "green", "red"), weights=two_blocks)
    torch.nn.init.normal_(model.backbone.heads[0].weight, std=0.3)
    return model.save(tmp_path_factory.mktemp("runs") / "colours")


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
