"""Speeds of tuned models beside the backbone that nothing is on."""

import pytest
import torch

import dyntune
from dyntune.studies import compare
from dyntune.studies.compare import DENSE, compare_speed


@pytest.mark.parametrize(("kind", "size"), [("vit", 32), ("siglip2", 32), ("dinov2", 48)])
def test_hosts_that_ask_for_more_than_images_are_timed(make_hf, monkeypatch, kind, size):
    """SigLIP 2 takes patches and their shapes; others are told that an image has another size than their positions."""
    monkeypatch.setattr(compare, "_SECONDS", 0.0)
    model = dyntune.tune(make_hf(kind), "dyt")
    found = compare_speed({"dyt": model}, torch.randn(2, 3, size, size))
    assert set(found) == {DENSE, "dyt"} and all(speed.images_per_second > 0 for speed in found.values())
