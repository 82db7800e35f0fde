"""A small tuned model with gates, and the folders that it is deployed to, made once."""

import pytest
import torch

import dyntune


@pytest.fixture(scope="session")
def tuned(make_host, randomise):
    """Two blocks, three classes with names, and gates that are open for about half of the patches."""
    model = dyntune.tune(make_host(depth=2, num_classes=3), "dyt:rate=0.5")
    randomise(model.backbone.blocks, seed=3)
    model.classes = ("blue", "green", "red")
    return model.eval()


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
def deployed(export, some_images, tmp_path_factory):
    """``deployed(runtime, precision)``: a folder, to be read only."""
    root = tmp_path_factory.mktemp("deployed")

    def folder(runtime="onnx", precision="fp32"):
        packages = {"onnx": ("onnxscript", "onnxruntime"), "openvino": ("openvino", "nncf"), "torch": ()}
        for package in packages[runtime]:
            pytest.importorskip(package)
        path = root / f"{runtime}-{precision}"
        if not path.exists():
            export.write(path, runtime, precision, some_images)
        return path

    return folder
