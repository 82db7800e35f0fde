"""BitFit: which parameters are trained, and the published count."""

import pytest
import timm
import torch
from torch import nn

import dyntune
from dyntune.core.errors import BackboneError
from dyntune.core.shapes import shapes_only


@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_base_patch16_clip_224"])
def test_published_counts(name):
    with shapes_only():
        model = dyntune.tune(timm.create_model(name, num_classes=100), "bitfit")
    cost = dyntune.cost(model)
    assert cost.trainable_params == 102_912
    assert cost.macs == cost.dense_macs


def test_trains_the_biases_and_the_head_on_every_host(make_host, host_name):
    host = make_host(host_name)
    model = dyntune.tune(host, "bitfit")
    head = {f"host.{name}" for name, _ in host.named_parameters() if name.startswith("head")}
    biases = {f"host.{name}" for name, _ in host.named_parameters() if name.endswith("bias")}
    assert set(model.tuned_state()) == biases | head
    assert len(biases) > 10


def test_closed_form_count(make_host):
    assert dyntune.cost(dyntune.tune(make_host(), "bitfit")).trainable_params == 3 * (7 * 32 + 4 * 32) + 2 * 32


def test_is_the_plain_host_when_merged(make_host):
    host = make_host()
    assert dyntune.tune(host, "bitfit").merge() is host


def test_trains_the_biases_under_a_change_too(make_host):
    state = dyntune.tune(make_host(), "lora", "bitfit").tuned_state()
    assert "host.blocks.0.attn.qkv.base.bias" in state
    assert "host.blocks.0.attn.qkv.base.weight" not in state


def test_a_backbone_without_biases_is_refused(make_host):
    host = make_host()
    for module in host.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm | nn.Conv2d) and module is not host.head:
            module.bias = None
    with pytest.raises(BackboneError, match="none outside its head; use linear"):
        dyntune.tune(host, "bitfit")


def test_tables_of_relative_positions_are_no_biases_whatever_they_are_called(make_host):
    host = make_host("beit")
    names = {name for name, _ in host.named_parameters() if name.endswith("bias_table")}
    assert names
    for block in host.blocks:
        block.attn.register_parameter("bias", nn.Parameter(torch.zeros(3, 9)))  # as other code calls its table
    model = dyntune.tune(host, "bitfit")
    trained = {name.removeprefix("host.") for name in model.tuned_state()}
    assert not trained & names and not any(name.endswith("attn.bias") for name in trained)
    assert {"blocks.0.attn.q_bias", "blocks.0.attn.v_bias", "blocks.0.norm1.bias", "patch_embed.proj.bias"} < trained
