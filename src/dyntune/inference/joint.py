"""One product for all that a gated unit reads of its tokens: the gate's logit and the adapter's hidden layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.parts.methods.adaptformer import Adapter
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.policies.gating import gating


class Joint(nn.Module):
    """A gate and the adapter beside the same unit, as two products instead of four passes over the tokens.

    The first maps a token to ``[logit, hidden layer, 1]``; the second maps the ReLU of that to the adapter's update,
    with a row of zeros for the logit and the bias as the row of the 1.

    Args:
        gate: ``C -> 1``.
        adapter: with its scale folded into the up-projection.
    """

    def __init__(self, gate: nn.Linear, adapter: Adapter) -> None:
        super().__init__()
        down, up = adapter.down_proj, adapter.up_proj
        width, hidden = down.in_features, down.out_features
        self.read = nn.Linear(width, hidden + 2)
        self.write = nn.Parameter(torch.zeros(hidden + 2, width))
        self.to(down.weight)
        with torch.no_grad():
            self.read.weight.zero_()
            self.read.weight[:1] = gate.weight
            self.read.weight[1:-1] = down.weight
            self.read.bias.zero_()
            if gate.bias is not None:
                self.read.bias[0] = gate.bias[0]
            self.read.bias[-1] = 1
            if down.bias is not None:
                self.read.bias[1:-1] = down.bias
            self.write[1:-1] = up.weight.T
            if up.bias is not None:
                self.write[-1] = up.bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens ``(B, N, C)`` to the gate's values ``(B, N)`` and to the tokens with the adapter's update added."""
        read = self.read(x)
        written = torch.addmm(x.flatten(0, 1), F.relu(read).flatten(0, 1), self.write)
        return read[..., 0], written.view_as(x)


def joined(backbone: Backbone, policies: Sequence[TokenPolicy], without: Unit | None) -> nn.ModuleDict:
    """Takes the adapter of every unit with a linear gate and one bottleneck adapter into a ``Joint``, by ``key(unit)``.

    Args:
        backbone: with adapters whose scale is folded.
        policies: on it.
        without: a unit whose gate is never asked.
    """
    joints = nn.ModuleDict()
    for unit in backbone.all_units():
        policy = gating(policies, unit)
        gate = None if policy is None else policy.linear_gate(unit)
        adapters = list(unit.parallel.values())
        if unit is not without and gate is not None and len(adapters) == 1 and isinstance(adapters[0], Adapter):
            joints[key(unit)] = Joint(gate, adapters[0])
            unit.parallel.clear()
    return joints


def key(unit: Unit) -> str:
    """The unit's path as the name of a module."""
    return unit.path.replace(".", "_")
