import timm
import torch
from torch import nn

from dyntune.core.shapes import shapes_only


def test_a_model_has_the_shapes_and_types_of_one_that_is_built_in_full():
    def described():
        host = timm.create_model("vit_tiny_patch16_224", depth=1, weight_init="jax")
        return {name: (t.shape, t.dtype, t.stride()) for name, t in host.state_dict().items()}, host

    expected, _ = described()
    with shapes_only():
        found, host = described()
    assert found == expected
    assert all(p.is_meta and p.requires_grad for p in host.parameters())


def test_what_has_content_is_computed_all_the_same():
    weight = nn.Linear(2, 2).weight
    with shapes_only(), torch.no_grad():
        nn.init.constant_(weight, 3.0)
        weight.mul_(2)
    assert weight.tolist() == [[6.0, 6.0], [6.0, 6.0]]
