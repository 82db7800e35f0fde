"""One product for all that is read of a gated unit's tokens: by its gate, by its adapter, by its surrogate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.parts.methods.adaptformer import Adapter
from dyntune.parts.policies.base import TokenPolicy
from dyntune.parts.policies.gating import gating
from dyntune.parts.policies.surrogate import Surrogate


class Joint(nn.Module):
    """A gate, the adapter beside the same unit and its surrogate, as two products instead of up to six.

    The first maps a token to ``[logit, hidden layer, 1]`` and, behind that, ``[V x + c, 1]`` of the surrogate. The
    second maps the ReLU of the former to the adapter's update, with a row of zeros for the logit and the bias as the
    row of the 1, and the latter, of tokens that skip the unit, to the surrogate's.

    Args:
        gate: ``C -> 1``.
        adapter: with its scale folded into the up-projection.
        surrogate: of the unit, where there is one.

    Attributes:
        beside: how many rows are those of gate and adapter.
    """

    def __init__(self, gate: nn.Linear, adapter: Adapter, surrogate: Surrogate | None = None) -> None:
        super().__init__()
        down, up = adapter.down_proj, adapter.up_proj
        width, hidden = down.in_features, down.out_features
        self.beside = hidden + 2
        rows = self.beside + (0 if surrogate is None else len(surrogate.down) + 1)
        self.read = skip_init(nn.Linear, width, rows)  # draws no random numbers of the caller's
        self.write = nn.Parameter(torch.zeros(rows, width))
        self.to(down.weight)
        weight, bias, write = self.read.weight, self.read.bias, self.write
        with torch.no_grad():
            weight.zero_()
            bias.zero_()
            weight[:1] = gate.weight
            weight[1 : hidden + 1] = down.weight
            if gate.bias is not None:
                bias[0] = gate.bias[0]
            bias[hidden + 1] = 1
            if down.bias is not None:
                bias[1 : hidden + 1] = down.bias
            write[1 : hidden + 1] = up.weight.T
            if up.bias is not None:
                write[hidden + 1] = up.bias
            if surrogate is not None:
                weight[self.beside : -1] = surrogate.down
                bias[self.beside : -1] = surrogate.shift
                bias[-1] = 1
                write[self.beside : -1] = surrogate.up.T
                write[-1] = surrogate.bias

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(B, N, C)`` to what is read of them, ``(B, N, rows)``, the gate's values in front."""
        read: Tensor = self.read(x)
        return read

    def written(self, x: Tensor, read: Tensor, mask: Tensor) -> Tensor:
        """The tokens with the updates of the adapter and, where they skip the unit, of its surrogate added.

        Args:
            x: ``(B, N, C)``.
            read: what ``forward`` makes of them.
            mask: ``(B, N)``, 1 for tokens that go through the unit, 0 for those that skip it.
        """
        hidden = F.relu(read[..., : self.beside])
        if read.shape[-1] > self.beside:
            hidden = torch.cat([hidden, read[..., self.beside :] * (1 - mask).unsqueeze(-1)], -1)
        return torch.addmm(x.flatten(0, 1), hidden.flatten(0, 1), self.write).view_as(x)


def joined(backbone: Backbone, policies: Sequence[TokenPolicy], without: Unit | None) -> nn.ModuleDict:
    """Takes what stands beside every unit with a linear gate and one bottleneck adapter into a ``Joint``, by its key.

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
            joints[key(unit)] = Joint(gate, adapters[0], cast("Surrogate | None", unit.surrogate))
            unit.parallel.clear()
            unit.surrogate = None
    return joints


def key(unit: Unit) -> str:
    """The unit's path as the name of a module."""
    return unit.path.replace(".", "_")
