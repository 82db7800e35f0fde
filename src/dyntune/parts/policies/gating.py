"""The base of policies that gate, and of their gates: noise, thresholds and decisions, whatever the score is."""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.losses import gumbel_difference
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import Gate, TokenPolicy


class LearnedGate(nn.Module, abc.ABC):
    """A gate per patch, active where its logit is above 0.

    While training, Gumbel noise makes the decision random: with g1, g2 ~ Gumbel(0, 1) the soft decision is
    ``S = sigmoid((l + g1 - g2) / temperature)``, the patch is active where ``S > 0.5`` (with probability
    ``sigmoid(l)``, whatever the temperature), and the gradient is that of S (straight-through; DyT section 3.2). In
    evaluation ``shift`` is added to the logits, which decides how many patches are active; see
    ``TunedModel.set_rate``.

    Args:
        temperature: of the sigmoid; it shapes the gradient only.

    Attributes:
        shift: added to the logits, 0 as trained; infinite to compute every patch, or none.
        rate: share of active patches that ``shift`` stands for; None as trained.
    """

    shift: Tensor

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("shift", torch.zeros(()), persistent=False)
        self.rate: float | None = None

    @abc.abstractmethod
    def scores(self, patches: Tensor) -> Tensor:
        """Patches ``(B, P, C)`` to numbers ``(B, P)``, the higher the more is a patch to be computed."""

    def forward(self, patches: Tensor) -> Tensor:
        """Patches ``(B, P, C)`` to a gate ``(B, P)`` in {0, 1}, differentiable while training."""
        return self.decide(self.logits(patches)).to(patches.dtype)

    def logits(self, patches: Tensor) -> Tensor:
        """Patches ``(B, P, C)`` to the logits ``(B, P)`` of being active, in fp32."""
        return self.logits_from(self.scores(patches))

    def logits_from(self, scores: Tensor) -> Tensor:
        """Scores ``(B, P)`` as logits in fp32."""
        logits = scores.float()
        return logits if self.training else logits + self.shift

    def decide(self, logits: Tensor) -> Tensor:
        """Logits to a gate in {0, 1}: noisy and differentiable while training, a plain threshold in evaluation."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        noise = self.noise
        return straight_through(logits + noise * gumbel_difference(logits) if noise else logits, self.temperature)

    @property
    def noise(self) -> float:
        """Factor on the noise of decisions while training."""
        return 1.0

    def set_rate(self, shift: float, rate: float | None) -> None:
        """Adds ``shift`` to the logits from now on; ``rate`` is the share of active patches that this gives."""
        self.shift.fill_(shift)  # in place: a captured CUDA graph reads it where it is
        self.rate = rate

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnedGate:
        shift = self.shift
        super()._apply(fn, recurse)
        # In fp32 whatever the precision of the weights, as the logits that it is added to are.
        self.shift = self.shift.float() if shift.is_meta else shift.to(self.shift.device)
        return self


def straight_through(logits: Tensor, temperature: float) -> Tensor:
    """1 where the logit is above 0, else 0; backward, the gradient of ``sigmoid(logits / temperature)``."""
    soft = (logits / temperature).sigmoid()
    hard = (soft > 0.5).to(soft.dtype)
    # In this order the forward value is exactly 0 or 1: hard - soft + soft may miss it by a rounding error.
    return hard + (soft - soft.detach())


@dataclass(frozen=True)
class GatingPolicy(TokenPolicy):
    """A policy that puts a ``LearnedGate`` on units, ``Unit.dispatcher``.

    An author writes ``gates``, ``make_gate`` and ``target_rate``.
    """

    def make_gate(self, unit: Unit) -> LearnedGate:
        """A new gate for a ``unit`` that this policy ``gates``."""
        raise NotImplementedError

    def target_rate(self, unit: Unit) -> float:
        """Share of patches that a gated ``unit`` is meant to compute; what is counted when no images are given."""
        raise NotImplementedError

    def install(self, backbone: Backbone) -> None:
        for unit in filter(self.gates, backbone.all_units()):
            unit.dispatcher = self.make_gate(unit)

    def learned(self, unit: Unit) -> LearnedGate:
        """The gate that stands on a gated ``unit``."""
        return cast(LearnedGate, unit.dispatcher)

    def gate(self, unit: Unit, tokens: Tokens) -> Gate:
        """Which patches a gated ``unit`` computes, with ``tokens.provenance``; others get what its surrogate adds."""
        return self.decision(unit, tokens, self.learned(unit).logits(tokens.patches))

    def decision(self, unit: Unit, tokens: Tokens, logits: Tensor) -> Gate:
        """The gate of a unit from its logits ``(B, P)``."""
        values = self.learned(unit).decide(logits).to(tokens.x.dtype)
        return Gate(unit.path, values, self, logits, tokens.provenance)

    def linear_gate(self, unit: Unit) -> nn.Linear | None:
        """The linear map from a token of a gated ``unit`` to one number, where nothing else enters the decision.

        Fast inference computes it together with other maps of the token and asks ``gate_from`` instead of ``gate``.
        """
        return None

    def gate_from(self, unit: Unit, tokens: Tokens, values: Tensor) -> Gate:
        """As ``gate``, from what ``linear_gate`` makes of the patches, ``(B, P)``."""
        return self.decision(unit, tokens, self.learned(unit).logits_from(values))

    def explored(self, unit: Unit) -> float | None:
        """Share of the patches that a gated ``unit`` skips which training computes all the same, to teach the gate.

        Above 0 and at most 1; None computes every patch and multiplies by the gate.
        """
        return None


def gating(policies: Sequence[TokenPolicy], unit: Unit) -> GatingPolicy | None:
    """The policy that decides which tokens go through ``unit``, if one does."""
    for policy in policies:  # not next(), whose default torch.compile of PyTorch 2.8 cannot trace
        if policy.gates(unit):
            return cast(GatingPolicy, policy)  # the check at its installation has seen to that
    return None
