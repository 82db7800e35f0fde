"""What people give a model, or tune, at first: a sentence says what is meant."""

import pytest
import torch
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

import dyntune
from dyntune.core.errors import DataError, SpecError, TrainingError


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
