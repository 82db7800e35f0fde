"""Token dispatch (DyT): a linear gate per unit lets informative tokens through; the others skip the unit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit, Where
from dyntune.core.losses import rate_loss
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import CompletePass, Gate, Output
from dyntune.parts.policies.gating import GatingPolicy, LearnedGate, straight_through

RateOf = Literal["training", "inference"]


class DrawnRate(nn.Module):
    """The rate that elastic gates aim at: in training drawn anew for each step, in evaluation the middle.

    Args:
        low: lowest rate, above 0.
        high: highest rate, below 1.
    """

    def __init__(self, low: float, high: float) -> None:
        super().__init__()
        self.low = low
        self.high = high
        self.drawn = self.middle

    @property
    def middle(self) -> float:
        """The rate halfway between the lowest and the highest."""
        return (self.low + self.high) / 2

    @property
    def target(self) -> float:
        """The rate that holds now."""
        return self.drawn if self.training else self.middle

    def begin_step(self, epoch: float | None = None) -> None:
        """Draws the rate of a training step from PyTorch's CPU generator, all rates alike."""
        self.drawn = self.low + (self.high - self.low) * torch.rand((), device="cpu").item()

    def distance(self, rate: float) -> float:
        """How far ``rate`` is from the middle, in logits."""
        return _logit(rate) - _logit(self.middle)


def _logit(rate: float) -> float:
    return math.log(rate / (1 - rate))


class Dispatcher(LearnedGate):
    """A linear gate per patch: ``l = w x + b``, active where ``l > 0``.

    An elastic gate is trained towards a rate r that changes from step to step: then
    ``l = w x + b + slope (logit(r) - logit(middle))`` with a learned slope.

    Args:
        width: channels C of a token.
        temperature: of the sigmoid; it shapes the gradient only.
        bias: b at the start.
    """

    slope: nn.Parameter | None

    def __init__(self, width: int, temperature: float, bias: float = 0.0) -> None:
        super().__init__(temperature)
        self.gate = nn.Linear(width, 1)
        self.drawn: DrawnRate | None = None
        self.slope = None
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, bias)

    def follow(self, drawn: DrawnRate) -> None:
        """Makes the gate elastic: it follows the rates that are drawn for all gates."""
        self.drawn = drawn
        self.slope = nn.Parameter(torch.ones(()))

    def scores(self, patches: Tensor) -> Tensor:
        return self.gate(patches).squeeze(-1)

    def logits_from(self, scores: Tensor) -> Tensor:
        logits = super().logits_from(scores)
        if not self.training or self.drawn is None or self.slope is None:
            return logits
        return logits + self.slope.float() * self.drawn.distance(self.drawn.target)


@dataclass(frozen=True)
class Dispatch(GatingPolicy):
    """Gates units by a learned linear dispatcher, trained towards a target activation rate (DyT).

    Class and register tokens are always active. Where attention is gated, active tokens attend to active tokens only,
    in training as in inference. Each gated unit adds ``D + 1`` parameters and D MACs per patch.

    With two rates the gates are elastic: every training step draws its target between them, all rates alike, and each
    gate learns how far its logits move with it, one more parameter per gated unit. In evaluation they aim at the middle
    until ``TunedModel.set_rate`` says another rate.

    Args:
        rate: target share of active patches, the mean over all gated units, between 0 and 1; or the lowest and the
            highest of a range, 0.3/0.9.
        where: the gated units. attn-mlp gates both sub-layers of a block separately, layer the block as a whole.
        temperature: of the Gumbel-sigmoid; it shapes the gradient only.
        rate_weight: coefficient of the rate loss, the squared distance of the mean activation to the target.
        rate_of: the activation that the rate loss holds to the target: the noisy gates' of training, as published, or
            that of inference, which decides without noise. The two differ by several points after a short training.
        complete_weight: coefficient of the complete-model loss: the task's loss with every token computed.
        distill_weight: coefficient of the distillation from the complete model to the dispatched one.
        bias: logit that all gates start at. 0, as published, starts with about half of the patches active everywhere;
            above 0 gates start open and close where that costs least, which short trainings need.
        explore: while training, share of the skipped patches that an MLP computes, at random, for the gradient of their
            gates; above 0 and at most 1. The loss is the same, and so is the expected gradient; 1 gives the published
            gradient itself and saves the backward pass through skipped patches. None, as published, computes all.
        complete_every: steps per pass of the complete model, whose loss terms then count so many times.
        complete_share: share of each batch that the complete model runs on, above 0 and at most 1.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, sections 3.2 and 3.3"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.mlp_token_select\.mlp_head\.": r"blocks.\1.mlp.dispatcher.gate."
    }

    rate: float | tuple[float, float] = 0.5
    where: Where = "mlp"
    temperature: float = 5.0
    rate_weight: float = 2.0
    rate_of: RateOf = "training"
    complete_weight: float = 1.0
    distill_weight: float = 1.0
    bias: float = 0.0
    explore: float | None = None
    complete_every: int = 1
    complete_share: float = 1.0

    def check(self) -> None:
        if isinstance(self.rate, tuple):
            self.require(len(self.rate) == 2, "one rate, or the lowest and the highest of a range")
            self.require(0 < self.rate[0] < self.rate[1] < 1, "two rates above 0 and below 1, the lower one first")
        else:
            self.require(0 <= self.rate <= 1, "rate between 0 and 1")
        self.require(self.temperature > 0, "temperature above 0")
        weights = (self.rate_weight, self.complete_weight, self.distill_weight)
        self.require(min(weights) >= 0, "loss weights of at least 0")
        self.require(self.explore is None or 0 < self.explore <= 1, "explore above 0 and at most 1, or none")
        self.require(
            self.explore is None or self.where in ("mlp", "attn-mlp"),
            "explore only where MLPs have gates of their own (where=mlp or attn-mlp); other units are computed whole",
        )
        self.require(self.complete_every >= 1, "complete_every of at least 1")
        self.require(0 < self.complete_share <= 1, "complete_share above 0 and at most 1")

    def install(self, backbone: Backbone) -> None:
        super().install(backbone)
        if isinstance(self.rate, tuple):
            # Named by its units, because several dispatches may stand on different ones.
            backbone.shared[f"{self.name()}-{self.where}"] = drawn = DrawnRate(*self.rate)
            for unit in filter(self.gates, backbone.all_units()):
                self.learned(unit).follow(drawn)

    def make_gate(self, unit: Unit) -> Dispatcher:
        return Dispatcher(unit.width, self.temperature, self.bias)

    def gates(self, unit: Unit) -> bool:
        return unit.kind == self.where or (self.where == "attn-mlp" and unit.kind != "layer")

    def linear_gate(self, unit: Unit) -> nn.Linear | None:
        return self.learned(unit).gate

    def decision(self, unit: Unit, tokens: Tokens, logits: Tensor) -> Gate:
        drawn = self.learned(unit).drawn
        return replace(super().decision(unit, tokens, logits), target=None if drawn is None else drawn.target)

    def learned(self, unit: Unit) -> Dispatcher:
        return cast(Dispatcher, unit.dispatcher)

    def target_rate(self, unit: Unit) -> float:
        rate = self.learned(unit).rate
        if rate is None:
            return sum(self.rate) / 2 if isinstance(self.rate, tuple) else self.rate
        return rate

    def explored(self, unit: Unit) -> float | None:
        return self.explore

    def complete_pass(self) -> CompletePass:
        return CompletePass(self.complete_weight, self.distill_weight, self.complete_every, self.complete_share)

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        if not self.rate_weight:
            return {}
        own = [gate for gate in output.gates if gate.policy is self]
        target = self.rate if isinstance(self.rate, float) else own[0].target
        assert target is not None  # elastic gates have one
        return {"rate": self.rate_weight * rate_loss([self._held(gate) for gate in own], target)}

    def _held(self, gate: Gate) -> Tensor:
        """The gate whose mean the rate loss holds to the target."""
        if self.rate_of == "training" or gate.logits is None:
            return gate.there
        return replace(gate, values=straight_through(gate.logits, self.temperature)).there
