"""The optimiser of a run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dyntune.training.settings import TrainSettings

MOMENTUM = 0.9
"""Of SGD."""


def make_optimizer(trained: Sequence[nn.Parameter], settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW or SGD with momentum on the trained tensors.

    Args:
        trained: the tensors, in the order in which a saved state lists them.
        settings: kind, learning rate, weight decay, and whether biases and other 1-D tensors decay.
    """
    groups: list[dict[str, object]] = [{"params": list(trained)}]
    if not settings.decay_1d:
        flat = [p for p in trained if p.ndim <= 1]
        groups = [{"params": [p for p in trained if p.ndim > 1]}, {"params": flat, "weight_decay": 0.0}]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=MOMENTUM, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(groups, lr=settings.lr, weight_decay=settings.weight_decay)
