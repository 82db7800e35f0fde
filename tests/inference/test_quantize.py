"""int8: every large product is in integers, gates, adapters and head are not, and what is left behind is an error."""

import logging
import platform

import numpy as np
import pytest
import torch

import dyntune
from dyntune.core.errors import ExportError
from dyntune.inference.export.folder import open_export
from dyntune.inference.export.int8 import onnx as quantize
from dyntune.inference.export.int8.onnx import audit, quantize_onnx, sums_saturate
from dyntune.inference.export.linears import BackboneLinears
from dyntune.inference.optimized import folded_copy

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
LINEARS = 2 * 4
"""qkv, proj, fc1 and fc2 of two blocks."""


@pytest.fixture(scope="module")
def linears(export):
    return BackboneLinears(export.folded)


def products(model):
    """Operator, and shape of the constant weight, of every product that has one."""
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    nodes = [node for node in model.graph.node if "MatMul" in node.op_type or node.op_type == "Gemm"]
    return [(node.op_type, weights[node.input[1]]) for node in nodes if node.input[1] in weights]


def floats(model):
    return [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]


def test_every_large_product_is_in_integers_and_no_other(exported, tuned):
    before = products(onnx.load(exported() / "model.onnx"))
    model = onnx.load(exported("onnx", "int8") / "model.onnx")
    width = tuned.backbone.blocks[0].width
    integer = [shape for operator, shape in products(model) if operator == "MatMulInteger"]
    assert sorted(integer) == sorted([(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)] * 2)
    left = [shape for operator, shape in products(model) if operator != "MatMulInteger"]
    assert left and len(left) + LINEARS == len(before)
    assert all(min(shape) < width for shape in left)
    assert open_export(exported("onnx", "int8")).config["integer_products"] == LINEARS


def test_gates_adapters_and_head_keep_their_bits(exported, tuned):
    kept = [weight for weight in floats(onnx.load(exported("onnx", "int8") / "model.onnx")) if weight.ndim == 2]

    def holds(vector):
        return any((rows == vector).all(1).any() for w in kept for rows in (w, w.T) if rows.shape[1] == len(vector))

    for block in tuned.backbone.blocks:
        adapter = block.mlp.parallel["adapter"]
        assert holds(block.mlp.dispatcher.gate.weight.detach().numpy()[0])
        assert all(holds(row) for row in adapter.down_proj.weight.detach().numpy())
        assert not holds(block.attn.out.module.weight.detach().numpy()[0])
    assert all(holds(row) for row in tuned.backbone.heads[0].weight.detach().numpy())


@torch.no_grad()
def test_logits_are_close_but_not_the_same(exported, tuned, some_images):
    expected = tuned(some_images)
    error = (open_export(exported("onnx", "int8"))(some_images) - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 0.15


def as_gemm(model):
    """Writes the first large product as an operator that is not the one asked for."""
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and n.name and _large(model, n))
    node.op_type = "Gemm"
    return node.name


def behind_a_transposition(model):
    """Puts the weight of a large product behind an operator that the exporter has not folded."""
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and _large(model, n))
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    turned = onnx.numpy_helper.from_array(np.ascontiguousarray(onnx.numpy_helper.to_array(weight).T), "turned")
    model.graph.initializer.append(turned)
    model.graph.node.insert(0, onnx.helper.make_node("Transpose", ["turned"], ["upright"], perm=[1, 0]))
    node.input[1] = "upright"
    return node.name


def another_weight(model):
    """Changes a weight, as an exporter does that folds something into it, so that nobody knows whose it is."""
    node = next(n for n in model.graph.node if n.op_type == "MatMul" and _large(model, n))
    weight = next(t for t in model.graph.initializer if t.name == node.input[1])
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * 2, weight.name))
    return node.name


def _large(model, node):
    return any(t.name == node.input[1] and min(t.dims) >= 32 for t in model.graph.initializer)


@pytest.mark.parametrize("spoil", [as_gemm, behind_a_transposition, another_weight])
def test_a_large_product_that_stays_in_floating_point_is_an_error(exported, linears, tmp_path, spoil):
    model = onnx.load(exported() / "model.onnx")
    name = spoil(model)
    onnx.save(model, tmp_path / "spoiled.onnx")
    with pytest.raises(ExportError, match=f"1 large products stayed in fp32: {name}(_MatMul)? "):
        quantize_onnx(tmp_path / "spoiled.onnx", tmp_path / "int8.onnx", linears)
    assert [path.name for path in tmp_path.iterdir()] == ["spoiled.onnx"]


def test_the_audit_names_every_product_of_an_fp32_model(exported, linears):
    with pytest.raises(ExportError, match=rf"{LINEARS} large products .*blocks\.0\.attn\.qkv.* and 3 more"):
        audit(onnx.load(exported() / "model.onnx"), linears)


def test_weights_have_7_bits_where_sums_would_saturate(exported, linears, tmp_path, monkeypatch):
    for saturate, bits in ((True, 7), (False, 8)):
        monkeypatch.setattr(quantize, "sums_saturate", lambda saturate=saturate: saturate)
        quantize_onnx(exported() / "model.onnx", tmp_path / "int8.onnx", linears)
        tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
        whole = [onnx.numpy_helper.to_array(t) for t in tensors if t.data_type == onnx.TensorProto.INT8]
        largest = max(int(np.abs(weight.astype(int)).max()) for weight in whole)
        assert 2 ** (bits - 2) < largest <= 2 ** (bits - 1)


@pytest.mark.parametrize(
    ("processor", "capabilities", "saturate"),
    [
        ("aarch64", {}, False),
        ("x86_64", {}, True),
        ("AMD64", {"avx2": True, "avx512_vnni": False}, True),
        ("x86_64", {"avx512_vnni": True}, False),
        ("x86_64", {"avx_vnni": True}, False),
    ],
)
def test_sums_saturate_on_x86_without_vnni(monkeypatch, processor, capabilities, saturate):
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert sums_saturate() is saturate


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_attention_pooling_stays_in_floating_point(make_host, randomise, images_for, tmp_path, runtime):
    pytest.importorskip("nncf" if runtime == "openvino" else "onnxscript")
    model = dyntune.tune(make_host("siglip", depth=2), "adaptformer")
    randomise(model.backbone.blocks, seed=3)
    images = images_for(model.backbone.host, 8)
    folder = dyntune.export(
        model.eval(), tmp_path / "out", runtime=runtime, precision="int8", calibration_images=images
    )
    opened = open_export(folder, threads=1)
    assert opened.config["integer_products"] == LINEARS
    with torch.no_grad():
        expected = model(images)
    assert (opened(images) - expected).abs().max() < 0.25 * expected.abs().max()


def test_an_error_of_the_quantiser_is_wrapped(exported, linears, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no such type")

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", fail)
    with pytest.raises(ExportError, match="cannot quantise the model: no such type"):
        quantize_onnx(exported() / "model.onnx", tmp_path / "int8.onnx", linears)
    assert not list(tmp_path.iterdir())


def test_an_error_of_nncf_is_wrapped(exported, linears):
    openvino = pytest.importorskip("openvino")
    pytest.importorskip("nncf")
    from dyntune.inference.export.int8.openvino import quantize_openvino

    model = openvino.Core().read_model(exported("openvino") / "model.xml")
    with pytest.raises(ExportError, match=r"NNCF cannot quantise the model on images \(1, 3, 8, 8\)"):
        quantize_openvino(model, torch.zeros(1, 3, 8, 8), linears)


def test_openvino_computes_the_same_products_in_integers(exported, linears, tuned, some_images):
    openvino = pytest.importorskip("openvino")
    from dyntune.inference.export.int8 import openvino as openvino_int8

    folder = exported("openvino", "int8")
    assert open_export(folder).config["integer_products"] == LINEARS
    core = openvino.Core()
    assert openvino_int8.count_integer_products(core.read_model(folder / "model.xml")) == LINEARS
    with pytest.raises(ExportError, match=f"{LINEARS} large products stayed in fp32"):
        openvino_int8.audit(core.read_model(exported("openvino") / "model.xml"), linears)
    with torch.no_grad():
        expected = tuned(some_images)
    error = (open_export(folder)(some_images) - expected).abs().max() / expected.abs().max()
    assert 1e-5 < error < 0.25


def test_quantising_leaves_the_applications_log_alone(exported, caplog):
    pytest.importorskip("nncf")
    exported("openvino", "int8")
    logging.getLogger("dyntune").warning("still heard")
    assert "still heard" in caplog.text


@torch.no_grad()
def test_surrogates_without_an_adapter_beside_them_are_not_quantised(make_host, randomise):
    model = folded_copy(randomise(dyntune.tune(make_host(), "dispatch:surrogate=0.5")), masks=True)
    linears, surrogate = BackboneLinears(model), model.backbone.blocks[0].mlp.surrogate
    for weight in (surrogate.down, surrogate.up):
        assert linears.stays_float(weight.numpy()) and linears.stays_float(weight.numpy().T)
        assert linears.path(weight.numpy()) is None
    assert linears.smallest == min(site.module.weight.numel() for site in model.backbone.sites("proj", "fc1"))
