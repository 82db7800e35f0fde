"""Token dispatch: a learned gate per unit lets informative tokens through; the others skip the unit."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from dyntune.backbones.base import Backbone, Unit, Where
from dyntune.losses import gumbel_difference, rate_loss
from dyntune.policies.base import Gate, Output, TokenPolicy
from dyntune.tokens import Tokens

RateOf = Literal["training", "inference"]


class Dispatcher(nn.Module):
    """A gate per patch: ``l = w x + b``, active where ``l > 0``.

    While training, Gumbel noise makes the decision random: with g1, g2 ~ Gumbel(0, 1) the soft decision is
    ``S = sigmoid((l + g1 - g2) / temperature)``, the patch is active where ``S > 0.5`` (with probability
    ``sigmoid(l)``, whatever the temperature), and the gradient is that of S (straight-through; DyT section 3.2).

    Args:
        width: channels C of a token.
        temperature: of the sigmoid; it shapes the gradient only.
        bias: b at the start.
    """

    def __init__(self, width: int, temperature: float, bias: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(width, 1)
        self.temperature = temperature
        nn.init.trunc_normal_(self.gate.weight, std=0.02)
        nn.init.constant_(self.gate.bias, bias)

    def forward(self, patches: Tensor) -> Tensor:
        """Patches ``(B, P, C)`` to a gate ``(B, P)`` in {0, 1}, differentiable while training."""
        return self.decide(self.logits(patches)).to(patches.dtype)

    def logits(self, patches: Tensor) -> Tensor:
        """Patches ``(B, P, C)`` to the logits ``(B, P)`` of being active, in fp32."""
        return self.gate(patches).squeeze(-1).float()

    def decide(self, logits: Tensor) -> Tensor:
        """Logits to a gate in {0, 1}: noisy and differentiable while training, a plain threshold in evaluation."""
        if not self.training:
            return (logits > 0).to(logits.dtype)
        return straight_through(logits + gumbel_difference(logits), self.temperature)


def straight_through(logits: Tensor, temperature: float) -> Tensor:
    """1 where the logit is above 0, else 0; backward, the gradient of ``sigmoid(logits / temperature)``."""
    soft = (logits / temperature).sigmoid()
    hard = (soft > 0.5).to(soft.dtype)
    # In this order the forward value is exactly 0 or 1: hard - soft + soft may miss it by a rounding error.
    return hard + (soft - soft.detach())


@dataclass(frozen=True)
class Dispatch(TokenPolicy):
    """Gates units by a learned linear dispatcher, trained towards a target activation rate (DyT).

    Class and register tokens are always active. Where attention is gated, active tokens attend to active tokens only,
    in training as in inference. Each gated unit adds ``D + 1`` parameters and D MACs per patch.

    Args:
        rate: target share of active patches, the mean over all gated units, between 0 and 1.
        where: the gated units. attn-mlp gates both sub-layers of a block separately, layer the block as a whole.
        temperature: of the Gumbel-sigmoid; it shapes the gradient only.
        rate_weight: coefficient of the rate loss, the squared distance of the mean activation to the target.
        rate_of: the activation that the rate loss holds to the target: the noisy gates' of training, as published, or
            that of inference, which decides without noise. The two differ by several points after a short training.
        complete_weight: coefficient of the complete-model loss: the task's loss with every token computed.
        distill_weight: coefficient of the distillation from the complete model to the dispatched one.
        bias: logit that all gates start at. 0, as published, starts with about half of the patches active everywhere;
            above 0 gates start open and close where that costs least, which short trainings need.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, sections 3.2 and 3.3"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.mlp_token_select\.mlp_head\.": r"blocks.\1.mlp.dispatcher.gate."
    }

    rate: float = 0.5
    where: Where = "mlp"
    temperature: float = 5.0
    rate_weight: float = 2.0
    rate_of: RateOf = "training"
    complete_weight: float = 1.0
    distill_weight: float = 1.0
    bias: float = 0.0

    def check(self) -> None:
        self.require(0 <= self.rate <= 1, "rate between 0 and 1")
        self.require(self.temperature > 0, "temperature above 0")
        weights = (self.rate_weight, self.complete_weight, self.distill_weight)
        self.require(min(weights) >= 0, "loss weights of at least 0")

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            unit.dispatcher = Dispatcher(unit.width, self.temperature, self.bias)

    def gates(self, unit: Unit) -> bool:
        return unit.kind == self.where or (self.where == "attn-mlp" and unit.kind != "layer")

    def gate(self, unit: Unit, tokens: Tokens) -> Gate:
        dispatcher = cast(Dispatcher, unit.get_submodule("dispatcher"))
        logits = dispatcher.logits(tokens.patches)
        values = dispatcher.decide(logits).to(tokens.x.dtype)
        return Gate(unit.path, values, self, logits, tokens.sources)

    def target_rate(self, unit: Unit) -> float:
        return self.rate

    def complete_weights(self) -> tuple[float, float]:
        return self.complete_weight, self.distill_weight

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        if not self.rate_weight:
            return {}
        gates = [self._held(gate) for gate in output.gates if gate.policy is self]
        return {"rate": self.rate_weight * rate_loss(gates, self.rate)}

    def _held(self, gate: Gate) -> Tensor:
        """The gate whose mean the rate loss holds to the target."""
        if self.rate_of == "training" or gate.logits is None:
            return gate.there
        return replace(gate, values=straight_through(gate.logits, self.temperature)).there
