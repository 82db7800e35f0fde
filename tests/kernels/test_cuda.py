"""What only a GPU shows: no synchronisation, CUDA graphs, and the compiler's own code around the kernels."""

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from dyntune import tune
from dyntune.inference.kernels import DeviceCounts, capture, supports
from dyntune.inference.kernels.launch import unavailable
from dyntune.parts.policies.dispatcher import Dispatcher

WITHOUT = unavailable(torch.device("cuda")) if torch.cuda.is_available() else "needs a CUDA device"
pytestmark = pytest.mark.skipif(WITHOUT is not None, reason=str(WITHOUT))


@pytest.fixture(scope="module", params=[torch.bfloat16, torch.float16], ids=str)
def case(request):
    """A model wide enough for every tile, about half of whose patches are active, and two batches."""
    torch.manual_seed(0)
    host = VisionTransformer(img_size=224, patch_size=16, embed_dim=384, depth=3, num_heads=6, num_classes=10)
    model = tune(host, "dyt:rate=0.5").eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.02)
    images = torch.randn(2, 24, 3, 224, 224)
    for name, module in model.named_modules():
        if isinstance(module, Dispatcher):
            gate = next(gate for gate in model.run(images[0]).gates if gate.unit in name)
            module.gate.bias -= gate.logits.median()
    return model.to("cuda", request.param), images.to("cuda", request.param)


def ways(model):
    """Every way to multiply that this GPU has for the model's dtype."""
    mlp = model.backbone.blocks[0].mlp
    return [products for products in ("triton", "grouped") if supports(mlp, products) is None]


def logits(model, products="triton"):
    execution = DeviceCounts(products=products)
    return lambda images: model.run(images, execution=execution).logits


def close(given, model, images):
    expected = model.run(images, execution="compact").logits
    torch.testing.assert_close(given.float(), expected.float(), rtol=0.05, atol=0.05 * expected.abs().max().item())


def test_the_host_never_waits(case):
    model, images = case
    for products in ways(model):
        logits(model, products)(images[0])  # kernels are compiled and tuned here
        torch.cuda.set_sync_debug_mode("error")
        try:
            given = logits(model, products)(images[1])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        close(given, model, images[1])


def test_a_graph_takes_other_images(case):
    model, images = case
    for products in ways(model):
        replay = capture(logits(model, products), images[0])
        first, second = replay(images[0]), replay(images[1])
        close(first, model, images[0])
        close(second, model, images[1])
        assert torch.equal(replay(images[0]), first)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(case, mode):
    model, images = case
    compiled = torch.compile(logits(model), fullgraph=True, dynamic=False, mode=mode)
    for batch in (*images, images[0]):
        with torch.no_grad():
            given = compiled(batch).clone()
        close(given, model, batch)
