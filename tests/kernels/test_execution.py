"""The execution with counts on the device gives what the compact one gives, and never asks for a count."""

import copy

import pytest
import torch

from dyntune import tune
from dyntune.core.errors import DyntuneError
from dyntune.inference.joint import joined, key
from dyntune.inference.kernels import DeviceCounts, capture, ops, supports
from dyntune.parts.policies.dispatcher import Dispatcher

MODELS = [
    ("plain", "dyt:rate=0.5"),
    ("clip", "dyt:rate=0.5"),
    ("siglip", "adaptformer+dispatch"),
    ("qk_norm", "dispatch"),
    ("plain", "adaptformer+dispatch:where=attn-mlp"),
    ("plain", "adaptformer:where=layer+dispatch:where=layer"),
    ("deit3", "dyt:rate=0.5"),
    ("swiglu", "dyt:rate=0.5"),
    ("plain", "adapter+dispatch"),
    ("plain", "dyt:rate=0.5+tome:r=2"),
]


@pytest.fixture(scope="module")
def build(make_host, images_for, randomise):
    """A tuned model whose gates differ from patch to patch, and images for it, in eval mode."""

    def build(host_name, spec, batch=3, **changes):
        host = make_host(host_name, **changes)
        return randomise(tune(host, spec)).eval(), images_for(host, batch)

    return build


def shared(model):
    """A copy of the model whose gates and adapters are shared products, and the execution that knows them."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "fold_scale"):
            module.fold_scale()
    joints = joined(model.backbone, model.policies, None)
    assert joints
    return model, DeviceCounts(
        {unit.path: joints[key(unit)] for unit in model.backbone.all_units() if key(unit) in joints}
    )


def close_gates(model, bias):
    for module in model.modules():
        if isinstance(module, Dispatcher):
            torch.nn.init.zeros_(module.gate.weight)
            torch.nn.init.constant_(module.gate.bias, bias)


@torch.no_grad()
def assert_equal_runs(model, images, own, execution, tolerance=2e-5):
    compact = model.run(images, execution="compact")
    output = own.run(images, execution=execution)
    torch.testing.assert_close(output.logits, compact.logits, rtol=tolerance, atol=tolerance)
    assert [gate.unit for gate in output.gates] == [gate.unit for gate in compact.gates]
    for own, expected in zip(output.gates, compact.gates, strict=True):
        assert torch.equal(own.values, expected.values)
    return output


@pytest.mark.parametrize(("host_name", "spec"), MODELS, ids=lambda value: value)
def test_equals_compact(device, build, host_name, spec):
    model, images = build(host_name, spec, depth=2)
    output = assert_equal_runs(model.to(device), images.to(device), model, DeviceCounts())
    assert any(0 < gate.values.mean() < 1 for gate in output.gates)


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_compact_with_shared_products(device, build, batch):
    model, images = build("plain", "dyt:rate=0.5", batch, depth=2)
    own, execution = shared(model.to(device))
    assert set(execution.joints) == {"blocks.0.mlp", "blocks.1.mlp"}
    assert_equal_runs(model, images.to(device), own, execution)


@pytest.mark.parametrize("bias", [-9.0, 9.0], ids=["none active", "all active"])
@pytest.mark.parametrize("where", ["mlp", "attn-mlp", "layer"])
@pytest.mark.parametrize("host_name", ["plain", "siglip"])
def test_none_and_all_active(device, build, bias, where, host_name):
    model, images = build(host_name, f"dispatch:where={where}", depth=2)
    close_gates(model.to(device), bias)
    output = assert_equal_runs(model, images.to(device), model, DeviceCounts())
    assert all(gate.values.eq(bias > 0).all() for gate in output.gates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_half_precision(device, build, dtype):
    model, images = build("plain", "dyt:rate=0.5", 8, depth=1)
    exact = model.to(device).run(images.to(device))
    for own, execution in ((model.to(dtype), DeviceCounts()), shared(model)):
        output = own.run(images.to(device, dtype), execution=execution)
        # Where rounding moves a logit across 0 the image is another one.
        same = (output.gates[0].values == exact.gates[0].values).all(1)
        assert same.any() and output.logits.dtype is dtype
        worst = (output.logits.float() - exact.logits)[same].abs().max()
        assert worst < 8 * torch.finfo(dtype).eps * exact.logits.abs().max()


@torch.no_grad()
def test_nothing_comes_back(device, build, nothing_comes_back):
    model, images = build("plain", "dyt:rate=0.5", depth=1)
    images = images.to(device)
    cases = [(model.to(device), DeviceCounts()), shared(model)]
    for spec in ("adaptformer+dispatch:where=attn-mlp", "dispatch:where=layer"):
        cases.append((build("plain", spec, depth=1)[0].to(device), DeviceCounts()))
    with nothing_comes_back():
        for own, execution in cases:
            own.run(images, execution=execution)
        with pytest.raises(AssertionError, match="asks the device"):
            model.run(images, execution="compact")


@torch.no_grad()
def test_is_one_graph_for_the_compiler(device, build):
    model, images = build("plain", "dyt:rate=0.5", depth=2)
    images = images.to(device)
    expected = model.to(device).run(images, execution="compact").logits
    own, execution = shared(model)
    compiled = torch.compile(
        lambda x: own.run(x, execution=execution).logits, fullgraph=True, backend="aot_eager", dynamic=False
    )
    torch.testing.assert_close(compiled(images), expected, rtol=2e-5, atol=2e-5)


def test_operators_describe_themselves(device):
    x = torch.randn(2, 5, 8, device=device)
    weight, bias = torch.randn(16, 8, device=device), torch.randn(16, device=device)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.joint, (x, weight[:4], bias[:4], weight[4:8]), test_utils=checks)
    gate = (x[:, 1:, 0] > 0).float()
    mlp = (gate, 1, bias[:8], bias[8:], 1e-6, weight, bias, weight.T.contiguous(), bias[:8], "gelu", "triton")
    torch.library.opcheck(ops.add_mlp, (torch.randn_like(x), x, *mlp), test_utils=checks)


def test_training_is_refused(device, build):
    model, images = build("plain", "dyt:rate=0.5", depth=1)
    with pytest.raises(DyntuneError, match="eval"):
        model.to(device).train().run(images.to(device), execution=DeviceCounts())


def test_gradients_are_refused(device, build):
    model, images = build("plain", "dyt:rate=0.5", depth=1)
    model, images = model.to(device), images.to(device)
    own, execution = shared(model)
    mlp = model.backbone.blocks[0].mlp

    def refused(model, images, execution):
        with pytest.raises(DyntuneError, match="no_grad"):
            model.run(images, execution=execution)

    refused(model, images, DeviceCounts())
    model.requires_grad_(False)
    refused(model, images.clone().requires_grad_(), DeviceCounts())
    for weight in (mlp.parts.first.weight, mlp.dispatcher.gate.bias):
        weight.requires_grad_(True)
        refused(model, images, DeviceCounts())
        weight.requires_grad_(False)
    own.requires_grad_(False)
    refused(own, images, execution)  # the shared products stand beside the model
    for joint in execution.joints.values():
        joint.requires_grad_(False)
    for runs, within in ((model, DeviceCounts()), (own, execution)):
        assert runs.run(images, execution=within).logits.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["first", "second", "norm"])
def test_weights_that_do_not_lie_row_by_row(device, build, name):
    model, images = build("plain", "dispatch", depth=1)
    mlp = model.to(device).backbone.blocks[0].mlp
    assert supports(mlp) is None
    layer = getattr(mlp.parts, name)
    strided = torch.stack([layer.weight, layer.weight], dim=-1)[..., 0]
    layer.weight = torch.nn.Parameter(strided)
    assert "contiguous" in supports(mlp)
    assert_equal_runs(model, images.to(device), model, DeviceCounts())


def test_shared_products_that_do_not_lie_row_by_row(device, build):
    model, images = build("plain", "dyt:rate=0.5", depth=1)
    own, execution = shared(model.to(device))
    for joint in execution.joints.values():
        joint.write = torch.nn.Parameter(joint.write.detach().T.contiguous().T)
        joint.read.weight = torch.nn.Parameter(joint.read.weight.detach().T.contiguous().T)
        assert not joint.write.is_contiguous() and not joint.read.weight.is_contiguous()
    assert_equal_runs(model, images.to(device), own, execution)


def test_products_that_do_not_exist():
    with pytest.raises(DyntuneError, match=r"triton, grouped; given 'cutlass'"):
        DeviceCounts(products="cutlass")


@torch.no_grad()
def test_products_that_do_not_multiply_this(device, build):
    for dtype, width, said in ((torch.float32, 32, "bf16"), (torch.bfloat16, 36, "multiples of 8")):
        model, images = build("plain", "dispatch", depth=1, embed_dim=width)
        model, images = model.to(device, dtype), images.to(device, dtype)
        assert supports(model.backbone.blocks[0].mlp) is None
        assert said in supports(model.backbone.blocks[0].mlp, "grouped")
        with pytest.raises(DyntuneError, match=rf"blocks\.0\.mlp: .*{said}.*triton"):
            model.run(images, execution=DeviceCounts(products="grouped"))


def test_says_what_it_does_not_skip(device, build):
    block = build("plain", "dispatch", depth=1)[0].to(device).backbone.blocks[0]
    assert supports(block.mlp) is None
    assert "attention" in supports(block.attn) and "attention" in supports(block)
    for host_name, spec in (("deit3", "dispatch"), ("swiglu", "dispatch"), ("plain", "adapter+dispatch")):
        model = build(host_name, spec, depth=1)[0].to(device)
        assert "linear map" in supports(model.backbone.blocks[0].mlp)
    assert "float64" in supports(
        build("plain", "dispatch", depth=1)[0].to(device, torch.float64).backbone.blocks[0].mlp
    )


def test_a_graph_needs_a_gpu(build):
    model, images = build("plain", "dispatch", depth=1)
    with pytest.raises(DyntuneError, match="CUDA"):
        capture(model, images)
    with pytest.raises(DyntuneError, match="at least 1"):
        capture(model, images, warmup=0)
