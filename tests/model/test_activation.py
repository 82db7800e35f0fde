"""Activation rates of batches, and of many of them."""

import pytest
import torch

from dyntune.core.tokens import EVERY_PATCH, Provenance
from dyntune.model.activation import MeanActivation, activation_rates
from dyntune.parts.policies.base import Gate


def gate(unit, *values):
    return Gate(unit, torch.tensor(values), policy=None, provenance=EVERY_PATCH)


def test_rates_are_the_share_of_active_patches_of_each_gate():
    gates = [gate("a", [1.0, 0, 0, 0], [1, 1, 0, 0]), gate("b", [1.0, 1, 1, 1], [1, 1, 1, 1])]
    assert activation_rates(gates).tolist() == [0.375, 1.0]
    assert activation_rates([]).shape == (0,)


def test_tokens_that_training_hides_are_left_out():
    present = torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 0]])
    hiding = Gate(
        "a", torch.tensor([[1.0, 0, 1, 1], [1, 1, 0, 1]]), policy=None, provenance=Provenance(present=present)
    )
    assert activation_rates([hiding]).tolist() == [pytest.approx(3 / 5)]


def test_each_image_counts_the_same_whatever_its_batch():
    active = MeanActivation()
    active.add([gate("a", [1.0, 1.0]), gate("b", [1.0, 0.0])], 1)
    active.add([gate("a", *[[0.0, 1.0]] * 3), gate("b", *[[0.0, 0.0]] * 3)], 3)
    assert active.per_unit == {"a": pytest.approx(0.625), "b": pytest.approx(0.125)}
    assert active.mean == pytest.approx(0.375)


def test_without_gates_every_patch_is_computed():
    active = MeanActivation()
    active.add([], 4)
    assert active.per_unit == {} and active.mean == 1
