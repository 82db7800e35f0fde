"""What people give a model, or tune, at first: a sentence says what is meant."""

import pytest
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import dyntune
from dyntune.core.errors import DataError, MachineError, SpecError, TrainingError
from dyntune.parts.methods.adaptformer import AdaptFormer


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (Image.new("RGB", (32, 32)), "Image"),
        ([Image.new("RGB", (32, 32))], "list"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
    ],
)
def test_images_that_nobody_preprocessed(make_host, given, named):
    model = dyntune.tune(make_host(), "dyt").eval()
    for run in (model, dyntune.optimize(model)):
        with pytest.raises(DataError, match=rf"given {named}: .*build_transform"):
            run(given)


@pytest.mark.parametrize(
    ("parts", "meant"), [(("dyt",), "'dyt:rate=0.7'"), (("dyt:bottleneck=4",), "'dyt:bottleneck=4,rate=0.7'")]
)
def test_options_that_are_given_to_tune(make_host, parts, meant):
    with pytest.raises(SpecError, match=meant):
        dyntune.tune(make_host(), *parts, rate=0.7)


def test_the_loss_of_a_distributed_model_is_had_from_its_wrapper():
    wrapper = DistributedDataParallel.__new__(DistributedDataParallel)
    torch.nn.Module.__init__(wrapper)
    with pytest.raises(SpecError, match=r"Call the wrapper itself, model\(pixel_values=images, labels=targets\)"):
        dyntune.training_loss(wrapper, torch.zeros(1, 3, 32, 32), torch.tensor([0]))
    with pytest.raises(SpecError, match="Give its module"):
        dyntune.calibrate(wrapper, torch.zeros(1, 3, 32, 32))


def test_features_are_no_logits_to_learn_from(make_host):
    model = dyntune.tune(make_host(num_classes=0), "adaptformer").train()
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    with pytest.raises(TrainingError, match="no loss of classes: the model has no head"):
        dyntune.training_loss(model, images, labels)
    dyntune.training_loss(model, images, labels, lambda features, _: features.square().mean()).total.backward()


def test_lengths_and_rates_of_a_training_that_are_none(make_host):
    model = dyntune.tune(make_host(), "dyt")
    for steps, lr in ((0, 1e-3), ("10", 1e-3), (10, 0.0), (10, float("nan")), (10, float("inf")), (10, "1e-3")):
        with pytest.raises(SpecError, match="expected"):
            model.begin_training(steps, lr)


def test_a_calibration_of_another_model(make_host):
    model, other = (dyntune.tune(make_host(depth=depth), "dyt").eval() for depth in (2, 1))
    other.calibration = dyntune.calibrate(other, torch.randn(4, 3, 32, 32), (0.5,))
    for calibration in (other.calibration, 3):
        model.calibration = calibration
        with pytest.raises(SpecError, match="not of this model's 2 gates"):
            model.set_rate(0.5)


def test_parts_that_the_memory_does_not_hold(make_host, monkeypatch):
    def install(self, backbone):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 384000000000 bytes.")

    host = make_host()
    before = {name: p.requires_grad for name, p in host.named_parameters()}
    with monkeypatch.context() as patched, pytest.raises(MachineError, match=r"384000000000 bytes\..* takes less"):
        patched.setattr(AdaptFormer, "install", install)
        dyntune.tune(host, "adaptformer")
    assert {name: p.requires_grad for name, p in host.named_parameters()} == before
    dyntune.tune(host, "adaptformer")


def test_hooks_that_a_tuned_model_passes_by_are_told(make_host, caplog):
    host, heard = make_host(), []
    host.blocks[0].mlp.register_forward_hook(lambda *given: heard.append("mlp"))
    dyntune.tune(host, "linear")
    assert not caplog.records
    host = make_host()
    host.blocks[0].register_forward_hook(lambda *given: heard.append("block"))
    host.blocks[1].attn.forward = lambda x, **options: x
    dyntune.tune(host, "linear")
    (record,) = caplog.records
    assert "blocks.0, blocks.1.attn: hooks there, or a forward of your own" in record.getMessage()
    assert "block" not in heard and "mlp" in heard


@pytest.mark.parametrize("indices", [0, -1, 99])
def test_numbers_of_blocks_that_there_are_not(make_host, indices):
    model = dyntune.tune(make_host(), "lora").eval()
    with pytest.raises(SpecError, match="expected how many of the last 3 blocks"):
        model.forward_intermediates(torch.zeros(1, 3, 32, 32), indices)


def test_labels_that_are_none(make_host):
    model = dyntune.tune(make_host(), "linear")
    images, shares = torch.randn(5, 3, 32, 32), torch.eye(5)
    found = dyntune.evaluate(model, [(images, shares)])
    assert found.accuracy == dyntune.evaluate(model, [(images, torch.arange(5))]).accuracy
    with pytest.raises(TrainingError, match=r"have targets of shape \(5, 1\)"):
        dyntune.evaluate(model, [(images, torch.zeros(5, 1, dtype=torch.long))])
