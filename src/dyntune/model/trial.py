"""The number of threads that a model runs quickest with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.threads import settle_threads
from dyntune.parts.policies.base import Output

_MACS = 1e9
"""Of a call of the trial: some milliseconds, and as many images as such a model is mostly given at a time."""


class Runs(Protocol):
    """A model that can be tried."""

    backbone: Backbone
    dense_macs: int

    def run(self, images: Tensor) -> Output: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


def settle_threads_for(model: Runs, most: int = 32) -> str | None:
    """Takes the number of threads with which a model on the CPU runs quickest, unless somebody has set one.

    Args:
        model: in eval mode.
        most: images per forward pass.

    Returns:
        What was taken, for people; None where nothing was to be chosen.
    """
    if next(model.parameters()).device.type != "cpu":
        return None
    count = max(1, min(most, round(_MACS / model.dense_macs)))
    images = torch.randn(count, *model.backbone.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return settle_threads(lambda: model.run(images))
