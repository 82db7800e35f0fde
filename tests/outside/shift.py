"""A tuning method: a trained vector that is added to every token, beside each MLP."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from dyntune.backbones.units import Parallel
from dyntune.parts.methods.base import TuningMethod


class Vector(Parallel):
    def __init__(self, width):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, tokens):
        return self.value.expand_as(tokens.x)


@dataclass(frozen=True)
class Shift(TuningMethod):
    """Adds a trained vector to the residual stream of every token, beside each MLP: D parameters per block."""

    source: ClassVar[str] = "another distribution"
    stays: ClassVar[str | None] = "the vector is added to tokens that skip the MLP too"

    def install(self, backbone):
        for unit in backbone.units("mlp"):
            unit.add_parallel("shift", Vector(unit.width))
