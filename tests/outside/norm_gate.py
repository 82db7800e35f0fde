"""A gating policy: tokens whose features are large go through an MLP, where "large" is learned."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from dyntune.parts.policies.gating import GatingPolicy, LearnedGate


class Loudness(LearnedGate):
    def __init__(self):
        super().__init__(temperature=1.0)
        self.threshold = nn.Parameter(torch.ones(()))

    def scores(self, patches):
        return patches.square().mean(-1) - self.threshold


@dataclass(frozen=True)
class NormGate(GatingPolicy):
    """Lets the patches through each MLP whose mean square is above a learned threshold: one parameter per block.

    Args:
        rate: share of the patches that is counted.
    """

    source: ClassVar[str] = "another distribution"
    rate: float = 0.5

    def gates(self, unit):
        return unit.kind == "mlp"

    def make_gate(self, unit):
        return Loudness()

    def target_rate(self, unit):
        return self.rate if unit.dispatcher.rate is None else unit.dispatcher.rate

    def loss_terms(self, output, teacher):
        means = torch.stack([gate.there.mean() for gate in output.gates if gate.policy is self])
        return {"rate": (means.mean() - self.rate).square()}
