"""Full tuning: every parameter of the host, none added."""

import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.shapes import shapes_only


def test_published_counts():
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, "full"))
    assert cost.trainable_params == 85_798_656
    assert cost.macs == cost.dense_macs == 17_581_972_224
    assert cost.total_params == 85_798_656 + 76_900
    assert cost.adapter_bytes == 4 * cost.total_params


def test_trains_every_parameter_and_adds_none(make_host, images_for, host_name):
    host = make_host(host_name)
    before = {name for name, _ in host.named_parameters()}
    model = dyntune.tune(host, "full")
    assert {name.removeprefix("host.") for name in model.tuned_state()} == before
    F.cross_entropy(model(images_for(host, 2)), torch.tensor([0, 1])).backward()
    assert all(p.requires_grad and p.grad is not None for p in host.parameters())


@torch.no_grad()
def test_logits_are_the_hosts(make_host, images_for):
    host = make_host()
    images = images_for(host, 2)
    expected = host(images)
    torch.testing.assert_close(dyntune.tune(host, "full").eval()(images), expected, atol=1e-6, rtol=1e-5)


def test_with_dispatch_trains_both(make_host):
    model = dyntune.tune(make_host(), "full", "dispatch")
    names = set(model.tuned_state())
    assert any("dispatcher" in name for name in names)
    assert names == {name for name, _ in model.backbone.named_parameters()}
