"""Gates that nobody has trained, set so that a wanted share of the patches is active."""

from __future__ import annotations

import torch
from torch import Tensor

from dyntune.backbones.units import Unit
from dyntune.core.errors import DyntuneError
from dyntune.core.tokens import Tokens
from dyntune.model.executions import Compact
from dyntune.model.rates import threshold
from dyntune.model.tuned import TunedModel
from dyntune.parts.policies.base import Gate
from dyntune.parts.policies.gating import GatingPolicy


class _Setting(Compact):
    """Moves the bias of each gate on the way, so that those behind it see what it lets through.

    Args:
        rate: share of the patches; None for the target of each gate.
    """

    def __init__(self, rate: float | None) -> None:
        self.rate = rate

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        linear, logits = policy.linear_gate(unit), policy.gate(unit, tokens).logits
        if linear is None or linear.bias is None or logits is None:
            raise DyntuneError(f"{policy.name()} at {unit.path} has no linear gate with a bias that could be set.")
        linear.bias.sub_(threshold(logits, policy.target_rate(unit) if self.rate is None else self.rate))
        return super().gated(unit, tokens, policy)


@torch.no_grad()
def set_gates(model: TunedModel, images: Tensor, rate: float | None = None) -> None:
    """Sets every gate's bias so that it lets the given share of the patches of these images through.

    The share is met exactly, up to whole patches, unless patches have equal logits. It is that of the whole batch:
    images in it may differ.

    Args:
        model: changed in place; put in eval mode.
        images: ``(B, 3, height, width)``.
        rate: share of the patches, between 0 and 1; None for the target that each gate was built with.

    Raises:
        DyntuneError: a gate is not linear.
    """
    model.eval().run(images, execution=_Setting(rate))
