"""Exported graphs: the same logits and masks in every runtime and for every batch size, and tokens really skipped."""

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import dyntune
from dyntune.core.errors import ExportError
from dyntune.inference import folded_copy
from dyntune.inference.export.program import export_program
from dyntune.inference.export.registry import lookup
from dyntune.inference.export.runtimes.onnx import OLDEST_OPSET, OPSET, Onnx, newest_opset
from dyntune.inference.export.runtimes.openvino import OpenVino
from dyntune.parts.methods.base import TuningMethod
from dyntune.parts.policies.dispatcher import Dispatcher
from dyntune.parts.registry import registered

RUNTIMES = ("torch", "onnx", "openvino")
BATCHES = (1, 3, 32)
SHALLOW = {
    "evit": "evit:keep=0.6,layers=0",
    "dynamicvit": "dynamicvit:keep=0.6,layers=1",
    "tome": "tome:r=3",
    "auto": "auto:budget=0.8",
}
"""Options with which parts have something to do on a host of two blocks."""
BLOCKS = {
    name: 1 if issubclass(cls, TuningMethod) and name not in ("vpt", "noah") else 2
    for name, cls in registered().items()
}
"""As many as a part has to meet: prompts replace each other in the second, where tokens that are taken are missed."""


def filled(host, *parts):
    """A tuned model in whose trained tensors and surrogates nothing is zero."""
    model = dyntune.tune(host, *parts)
    generator = torch.Generator().manual_seed(0)
    surrogates = {name: buffer for name, buffer in model.named_buffers() if ".surrogate." in name}
    with torch.no_grad():
        for tensor in (model.tuned_state() | surrogates).values():
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.1)
    return model.eval()


def between(logits):
    """What the bias must change by so that gates decide both ways, and no logit is near the threshold."""
    values = logits.flatten().sort().values
    middle = slice(len(values) // 4, -len(values) // 4)
    widest = values.diff()[middle].argmax() + middle.start
    return -(values[widest] + values[widest + 1]) / 2


def active(output):
    return torch.stack([gate.on_patches > 0.5 for gate in output.gates], dim=1)


def installed(name):
    """The runtime of that name; skips the test where a package is missing."""
    runtime = lookup(name)()
    for package in (*runtime.writes_with, *runtime.runs_with):
        pytest.importorskip(package)
    return runtime


def opened(name, program, folder):
    """The program in a runtime, by way of its file."""
    runtime = installed(name)
    runtime.write(program, folder / runtime.file, spec="")
    return runtime.open(folder / runtime.file, threads=1)


def assert_agrees(runtime, model, images, masks):
    """Logits, and masks where there are some, are those of the model, for every batch size."""
    for batch in BATCHES:
        logits, found = runtime.run(images[:batch])
        with torch.no_grad():
            expected = model.run(images[:batch])
        torch.testing.assert_close(logits, expected.logits, atol=1e-4, rtol=1e-4)
        if masks:
            assert found.dtype is torch.bool
            assert torch.equal(found, active(expected))
        else:
            assert found is None


@pytest.fixture(scope="module")
def seen():
    """The graphs that have been written as ONNX: parts that fold away leave the same one, that of their host."""
    return set()


@pytest.mark.parametrize("name", registered())
def test_every_part_exports_and_agrees(make_host, images_for, seen, tmp_path, name):
    model = filled(make_host("registers", depth=BLOCKS[name]), SHALLOW.get(name, name))
    images = images_for(model.backbone.host, max(BATCHES))
    masks = bool(model.run(images[:1]).gates)
    program = export_program(folded_copy(model, masks=masks), masks)
    assert_agrees(opened("torch", program, tmp_path), model, images, masks)
    if program.graph_module.code not in seen:
        seen.add(program.graph_module.code)
        assert_agrees(opened("onnx", program, tmp_path), model, images, masks)


@pytest.fixture(
    scope="module",
    params=[("siglip", "attn-mlp"), ("plain", "attn"), ("registers", "layer")],
    ids="-".join,
)
def gated(request, make_host, images_for):
    """A model, its images and program: some gates let no patch through, some all, some a part; prefixes of 0, 1, 5."""
    host, where = request.param
    model = filled(make_host(host), f"dispatch:where={where}")
    images = images_for(model.backbone.host, max(BATCHES))
    for module in model.modules():
        if isinstance(module, Dispatcher):
            nn.init.normal_(module.gate.weight, std=1.0)
    model.requires_grad_(False)
    for block, bias in zip(model.backbone.blocks, (-1e4, 1e4, None), strict=True):
        for unit in (block.attn, block.mlp, block):
            if unit.dispatcher is not None:
                logits = next(gate.logits for gate in model.run(images).gates if gate.unit == unit.path)
                unit.dispatcher.gate.bias += between(logits) if bias is None else bias
    rates = active(model.run(images)).float().mean((0, 2)).unflatten(0, (3, -1)).mean(1)
    assert rates[0] == 0 and rates[1] == 1 and 0 < rates[2] < 1
    return model, images, export_program(folded_copy(model, masks=True), masks=True)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_gates_that_let_nothing_everything_and_a_part_through(gated, tmp_path, runtime):
    model, images, program = gated
    assert_agrees(opened(runtime, program, tmp_path), model, images, masks=True)


@pytest.mark.parametrize(
    "runtime, host, spec",
    [
        ("onnx", "eva02", "dispatch:where=layer"),
        ("openvino", "mixed", "tome:r=3"),
        ("torch", "dinov3", "ssf"),
        ("onnx", "beit", "dispatch:where=attn"),
    ],
)
def test_hosts_whose_attention_asks_where_tokens_lie(make_host, images_for, tmp_path, runtime, host, spec):
    model = filled(make_host(host, depth=2), spec)
    masks = bool(model.run(images_for(model.backbone.host, 1)).gates)
    program = export_program(folded_copy(model, masks=masks), masks)
    assert_agrees(opened(runtime, program, tmp_path), model, images_for(model.backbone.host, max(BATCHES)), masks)


def test_openvino_agrees_on_a_reduction_without_gates(make_host, images_for, tmp_path):
    model = filled(make_host("plain", depth=2), SHALLOW["dynamicvit"])
    runtime = opened("openvino", export_program(folded_copy(model), masks=False), tmp_path)
    assert_agrees(runtime, model, images_for(model.backbone.host, max(BATCHES)), masks=False)


@pytest.mark.parametrize("reducer", ["tome:r=3", "evit:keep=0.6,layers=0"])
def test_openvino_gives_masks_of_patches_that_were_merged_later(make_host, images_for, tmp_path, reducer):
    model = filled(make_host("plain", depth=2), "dyt", reducer)
    runtime = opened("openvino", export_program(folded_copy(model, masks=True), masks=True), tmp_path)
    assert_agrees(runtime, model, images_for(model.backbone.host, max(BATCHES)), masks=True)


@pytest.fixture(scope="module")
def traced(make_host):
    """A DyT model and its program with the gates' masks."""
    model = filled(make_host("plain", depth=2), "dyt:recipe=published")
    return model, export_program(folded_copy(model, masks=True), masks=True)


@pytest.fixture(scope="module")
def written(traced, images_for, tmp_path_factory):
    """The model, its images and its ONNX file."""
    installed("onnx")
    model, program = traced
    path = tmp_path_factory.mktemp("written") / "model.onnx"
    Onnx().write(program, path, model.spec)
    return model, images_for(model.backbone.host, 8), path


def rows_of_products(path, images, inputs, outputs, folder):
    """Rows that ONNX Runtime multiplied with a matrix of that shape, of each product in turn, by its own profile."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    session = onnxruntime.InferenceSession(path, options)
    session.run(None, {"images": images.numpy()})
    rows = []
    for event in json.loads(Path(session.end_profiling()).read_text()):
        if event.get("args", {}).get("op_name") in ("Gemm", "MatMul") and event["name"].endswith("_kernel_time"):
            *before, read = next(iter(event["args"]["input_type_shape"][0].values()))
            *_, made = next(iter(event["args"]["output_type_shape"][0].values()))
            if (read, made) == (inputs, outputs):
                rows.append(int(np.prod(before)))
    return rows


def test_only_active_tokens_are_computed(written, tmp_path):
    model, images, path = written
    width = model.backbone.blocks[0].width
    expected = [int(gate.values.sum()) + len(images) for gate in model.run(images).gates]  # with the class tokens
    assert max(expected) < images.shape[0] * 17
    assert rows_of_products(path, images, width, 4 * width, tmp_path) == expected


@pytest.fixture(
    scope="module", params=[("siglip", 1, "dyt:dispatch=attn-mlp"), ("registers", 2, "tome:r=3/0")], ids=lambda p: p[-1]
)
def of_any_opset(request, make_host):
    """A model and its program: with gates, and with attention that weighs merged tokens in the second block."""
    host, depth, spec = request.param
    model = filled(make_host(host, depth=depth), spec)
    return model, export_program(folded_copy(model), masks=False)


@pytest.mark.parametrize("opset", ["oldest", "newest"])
def test_the_oldest_and_the_newest_opset_agree(of_any_opset, images_for, tmp_path, opset):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    version = OLDEST_OPSET if opset == "oldest" else newest_opset()
    assert OLDEST_OPSET == 18 and newest_opset() >= OPSET
    model, program = of_any_opset
    Onnx(opset=version).write(program, tmp_path / "model.onnx", model.spec)
    file = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in file.opset_import] == [("", version)]
    assert file.ir_version == (8 if opset == "oldest" else 10)
    fused = {node.op_type for node in file.graph.node} & {"Attention", "Softmax"}
    assert fused == ({"Softmax"} if opset == "oldest" else {"Attention"})
    session = Onnx().open(tmp_path / "model.onnx", threads=None)
    assert_agrees(session, model, images_for(model.backbone.host, max(BATCHES)), False)


@pytest.mark.parametrize("past", [-1, 1])
def test_an_opset_that_cannot_be_written_is_refused(traced, tmp_path, past):
    installed("onnx")
    version = OLDEST_OPSET - 1 if past < 0 else newest_opset() + 1
    _, program = traced
    with pytest.raises(ExportError, match=f"opset {version} cannot be written.* write 18 to {newest_opset()}"):
        Onnx(opset=version).write(program, tmp_path / "model.onnx", "dyt")
    assert not list(tmp_path.iterdir())


def test_the_file_says_what_it_is(written):
    import onnx

    model, _, path = written
    file = onnx.load(path)
    assert file.opset_import[0].version == OPSET
    assert {entry.key: entry.value for entry in file.metadata_props} == {
        "dyntune_version": dyntune.__version__,
        "spec": model.spec,
    }
    values = {value.name: value.type.tensor_type.shape.dim for value in (*file.graph.input, *file.graph.output)}
    assert list(values) == ["images", "logits", "active"]
    assert all(dimensions[0].dim_param == "batch" for dimensions in values.values())
    assert [dimension.dim_value for dimension in values["active"]][1:] == [2, 16]


def test_backbone_linears_are_plain_products_that_can_be_quantised(written):
    import onnx

    *_, path = written
    graph = onnx.load(path).graph
    wide = {w.name: list(w.dims) for w in graph.initializer if len(w.dims) == 2 and min(w.dims) >= 32}
    used = [(node.op_type, wide[name]) for node in graph.node for name in node.input if name in wide]
    shapes = sorted([[32, 32], [32, 96], [32, 128], [128, 32]] * 2)
    assert sorted(shape for _, shape in used) == shapes
    assert {operator for operator, _ in used} == {"MatMul"}


def test_weights_that_do_not_fit_into_one_file_lie_beside_it(make_host, images_for, tmp_path, monkeypatch):
    installed("onnx")
    model = filled(make_host(depth=1), "linear")
    program = export_program(folded_copy(model), masks=False)
    images = images_for(model.backbone.host, 8)
    monkeypatch.setattr("dyntune.inference.export.runtimes.onnx._LARGEST", 0)
    Onnx().write(program, tmp_path / "big.onnx", model.spec)
    assert {path.name for path in tmp_path.iterdir()} == {"big.onnx", "big.onnx.data"}
    (tmp_path / "moved").mkdir()
    for path in list(tmp_path.glob("big*")):
        path.rename(tmp_path / "moved" / path.name)
    session = Onnx().open(tmp_path / "moved" / "big.onnx", threads=None)
    torch.testing.assert_close(session(images), model(images), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [{"is_causal": True}, {"dropout_p": 0.5}, {"enable_gqa": True}], ids=str)
def test_attention_that_is_not_translated_is_refused(tmp_path, kind):
    pytest.importorskip("onnxscript")

    class Attention(nn.Module):
        def forward(self, images):
            return nn.functional.scaled_dot_product_attention(images, images, images, **kind)

    program = torch.export.export(Attention(), (torch.ones(2, 3, 4, 4),))
    with pytest.raises(
        ExportError, match=r"cannot be written as ONNX: attention with dropout.* not translated"
    ) as error:
        Onnx().write(program, tmp_path / "model.onnx", "")
    assert len(str(error.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_traced_is_said_in_one_sentence_without_the_graph(make_host, capfd):
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = filled(make_host(depth=1), "dyt")
    model.backbone.host.norm = Branching()
    with pytest.raises(ExportError, match=r"^dyt cannot be exported, because PyTorch cannot trace .* guard") as error:
        export_program(folded_copy(model), masks=False)
    assert len(str(error.value).splitlines()) == 1 and "suggested fixes" not in str(error.value)
    printed = capfd.readouterr()
    assert not printed.out and "def forward" not in printed.err


def test_what_openvino_does_not_translate_is_said_in_one_sentence_and_nothing_is_silenced(tmp_path, caplog):
    pytest.importorskip("openvino")

    class Bessel(nn.Module):
        def forward(self, images):
            return torch.special.bessel_j0(images)

    program = torch.export.export(Bessel(), (torch.ones(2, 3, 4, 4),))
    with pytest.raises(ExportError, match=r"cannot be converted to OpenVINO: .*bessel_j0") as error:
        OpenVino().write(program, tmp_path / "model.xml", "")
    assert len(str(error.value).splitlines()) == 1
    logging.getLogger("dyntune").warning("still heard")
    assert "still heard" in caplog.text


def test_masks_of_a_model_without_gates_are_refused(make_host):
    with pytest.raises(ExportError, match="no gates"):
        export_program(folded_copy(filled(make_host(), "adaptformer"), masks=True), masks=True)


@pytest.mark.parametrize("kind", RUNTIMES)
def test_a_damaged_file_is_named(tmp_path, kind):
    runtime = installed(kind)
    (tmp_path / runtime.file).write_bytes(b"not a model")
    with pytest.raises(ExportError, match=runtime.file) as error:
        runtime.open(tmp_path / runtime.file, threads=None)
    assert len(str(error.value).splitlines()) == 1


def test_openvino_refuses_another_file_name(traced, tmp_path):
    _, program = traced
    with pytest.raises(ExportError, match=r"ends in \.xml; given model\.onnx"):
        OpenVino().write(program, tmp_path / "model.onnx", "linear")


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_threads_get_their_own_answers(make_host, images_for, tmp_path, runtime):
    model = filled(make_host(depth=1), "dyt")
    session = opened(runtime, export_program(folded_copy(model, masks=False), masks=False), tmp_path)
    batches = [images_for(make_host(depth=1), 1) * scale for scale in (0.5, 1.0, 2.0)]
    expected = [session.compute(batch)[0].clone() for batch in batches]

    def answers(place):
        return [session.compute(batches[place])[0] for _ in range(30)]

    with ThreadPoolExecutor(len(batches)) as pool:
        for own, found in zip(expected, pool.map(answers, range(len(batches))), strict=True):
            for logits in found:
                torch.testing.assert_close(logits, own)


def test_neither_export_nor_optimize_draws_random_numbers(make_host, tmp_path):
    model = dyntune.tune(make_host(), "dyt").eval()
    before = torch.get_rng_state()
    dyntune.optimize(model)
    dyntune.export(model, tmp_path / "export", runtime="torch")
    assert torch.equal(torch.get_rng_state(), before)
