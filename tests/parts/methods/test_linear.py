"""The linear probe: the head and nothing else."""

import timm
import torch
import torch.nn.functional as F

import dyntune
from dyntune.core.shapes import shapes_only


def test_published_counts():
    with shapes_only():
        host = timm.create_model("vit_base_patch16_224", num_classes=100)
    cost = dyntune.cost(dyntune.tune(host, "linear"))
    assert cost.trainable_params == 0
    assert cost.head_params == 768 * 100 + 100
    assert cost.head_macs == 76_800
    assert cost.macs == cost.dense_macs == 17_581_972_224
    assert cost.adapter_bytes == 4 * cost.head_params


def test_trains_the_head_alone(make_host, images_for, host_name):
    host = make_host(host_name)
    model = dyntune.tune(host, "linear")
    heads = {"head.weight", "head.bias"} | (
        {"head_dist.weight", "head_dist.bias"} if host_name == "distilled" else set()
    )
    assert set(model.tuned_state()) == {f"host.{name}" for name in heads}
    F.cross_entropy(model(images_for(host, 2)), torch.tensor([0, 1])).backward()
    assert {name for name, p in host.named_parameters() if p.grad is not None} == heads


@torch.no_grad()
def test_logits_are_the_hosts(make_host, images_for):
    host = make_host("registers")
    images = images_for(host, 2)
    expected = host(images)
    torch.testing.assert_close(dyntune.tune(host, "linear").eval()(images), expected, atol=1e-6, rtol=1e-5)
