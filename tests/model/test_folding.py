"""Merging: what folds, what stays and why, and what a merged model is."""

import pytest
import torch

import dyntune
from dyntune.core.errors import CheckpointError


def filled(model):
    """Random values in everything that is trained."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.tuned_state().items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2 + ("scale" in name))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    "spec,stays",
    [
        ("lora+ssf", []),
        ("ssf+lora:targets=q/v/fc1+bitfit", []),
        ("full+lora", []),
        ("lora+adaptformer:scale=learnable", ["adaptformer:scale=learnable"]),
        ("lora+dyt:rate=0.3", ["adaptformer:scale=1", "dispatch:rate=0.3"]),
        ("moe-adapter:scale=3", ["moe-adapter:scale=3"]),
    ],
)
def test_combinations_fold_as_far_as_they_can(make_host, images_for, caplog, spec, stays):
    model = filled(dyntune.tune(make_host("registers"), spec))
    images = images_for(model.backbone.host, 3)
    expected = model(images)
    merged = model.merge()
    assert list(model.unmerged) == stays
    assert [record.getMessage().split(" is not merged: ")[0] for record in caplog.records] == stays
    assert merged is (model if stays else model.backbone.host)
    torch.testing.assert_close(merged(images), expected, atol=1e-4, rtol=1e-4)
    assert not any(site.changes for site in model.backbone.sites())


@torch.no_grad()
def test_a_scale_becomes_part_of_the_up_projection(make_host):
    model = filled(dyntune.tune(make_host(), "adaptformer:scale=learnable"))
    adapter = model.backbone.blocks[1].mlp.parallel["adapter"]
    scale, up, bias = adapter.scale.item(), adapter.up_proj.weight.clone(), adapter.up_proj.bias.clone()
    model.merge()
    assert adapter.scale == 1.0
    assert "scale" not in dict(adapter.named_parameters())
    torch.testing.assert_close(adapter.up_proj.weight, scale * up)
    torch.testing.assert_close(adapter.up_proj.bias, scale * bias)


def test_merging_twice_changes_nothing(make_host, images_for):
    model = filled(dyntune.tune(make_host(), "lora"))
    first = {name: p.clone() for name, p in model.merge().named_parameters()}
    assert all(torch.equal(p, first[name]) for name, p in model.merge().named_parameters())


def test_a_merged_model_is_not_saved_as_an_adapter(make_host, tmp_path):
    model = filled(dyntune.tune(make_host(), "lora"))
    model.merge()
    with pytest.raises(CheckpointError, match="the model is merged"):
        model.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
