"""Gates set to a rate on given images."""

import pytest
import torch

import dyntune
from dyntune.core.errors import DyntuneError
from dyntune.studies.bench.gates import set_gates


@pytest.mark.parametrize("where", ["mlp", "attn", "attn-mlp", "layer"])
@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 1.0])
def test_every_gate_lets_exactly_the_share_through(make_host, randomise, images_for, where, rate):
    host = make_host()
    images = images_for(host, 4)
    model = randomise(dyntune.tune(host, "adaptformer", f"dispatch:where={where}"), seed=1)
    before = [gate.values.mean().item() for gate in model.eval().run(images).gates]
    set_gates(model, images, rate)
    gates = model.run(images).gates
    assert [gate.values.mean().item() for gate in gates] == [rate] * len(gates)
    assert before != [rate] * len(gates)


def test_a_share_of_patches_is_rounded_to_whole_ones(make_host, images_for):
    host = make_host()
    model, images = dyntune.tune(host, "dyt:rate=0.3"), images_for(host, 1)
    set_gates(model, images)
    assert [gate.values.sum().item() for gate in model.run(images).gates] == [5.0] * 3  # of 16, for 0.3


def test_gates_are_trained_on_afterwards(make_host, images_for):
    host = make_host()
    model, images = dyntune.tune(host, "dyt"), images_for(host, 2)
    set_gates(model, images)
    biases = [p for name, p in model.named_parameters() if name.endswith("dispatcher.gate.bias")]
    assert len(biases) == 3 and all(isinstance(p, torch.nn.Parameter) and p.requires_grad for p in biases)
    assert not model.training


def test_a_gate_without_a_bias_is_refused(make_host, images_for):
    host = make_host()
    model = dyntune.tune(host, "dyt")
    model.backbone.blocks[1].mlp.dispatcher.gate.bias = None
    with pytest.raises(DyntuneError, match=r"dispatch at blocks\.1\.mlp"):
        set_gates(model, images_for(host, 1))
