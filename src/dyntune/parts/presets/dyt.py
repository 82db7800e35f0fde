"""Dynamic Tuning (DyT): adapters that see every token, and dispatch that lets the rest of the work be skipped."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dyntune.backbones.units import Where
from dyntune.parts.methods.adaptformer import AdaptFormer
from dyntune.parts.methods.moe_adapter import MoeAdapter, Normalise
from dyntune.parts.policies.dispatch import Dispatch, RateOf
from dyntune.parts.presets.base import Preset
from dyntune.parts.spec import Part


@dataclass(frozen=True)
class DyT(Preset):
    """Dynamic Tuning: ``adaptformer`` (or ``moe-adapter``) and ``dispatch`` on the same units of the frozen backbone.

    With z the residual stream after attention, M the mask and A the adapter, a block with MLP dispatch gives
    ``z + M * mlp(norm2(z)) + A(z)``.

    Args:
        rate: target share of active patches, between 0 and 1; or a range, 0.3/0.9, from which every training step draws
            its own.
        dispatch: the units that are gated and get an adapter. The paper calls them MLP, Attention, Attention-MLP,
            Layer.
        bottleneck: channels of the adapter's hidden layer.
        scale: factor on the adapter's output; "learnable" trains one scalar per adapter.
        dropout: probability of dropping a hidden value of the adapter while training.
        temperature: of the Gumbel-sigmoid; it shapes the gradient only.
        experts: 1 for a plain adapter, more for the MoE-adapter.
        normalise: what turns the MoE router's outputs into the experts' shares.
        rate_weight: coefficient of the rate loss.
        rate_of: whether the rate loss holds the noisy activation of training to the target, as published, or that of
            inference.
        complete_weight: coefficient of the complete-model loss.
        distill_weight: coefficient of the distillation loss.
        gate_bias: logit that all gates start at; 0 as published, above 0 they start open.
        explore: share of the skipped patches that training computes at random to teach their gates; none, as published,
            computes all (see dispatch).
        complete_every: steps per pass of the complete model, whose loss terms then count so many times.
        complete_share: share of each batch that the complete model runs on.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808"

    rate: float | tuple[float, float] = 0.5
    dispatch: Where = "mlp"
    bottleneck: int = 8
    scale: float | Literal["learnable"] = 0.1
    dropout: float = 0.1
    temperature: float = 5.0
    experts: int = 1
    normalise: Normalise = "softmax"
    rate_weight: float = 2.0
    rate_of: RateOf = "training"
    complete_weight: float = 1.0
    distill_weight: float = 1.0
    gate_bias: float = 0.0
    explore: float | None = None
    complete_every: int = 1
    complete_share: float = 1.0

    def check(self) -> None:
        self.require(self.experts >= 1, "at least 1 expert")
        self.expand()

    def expand(self) -> tuple[Part, ...]:
        adapter: dict[str, Any] = {
            "bottleneck": self.bottleneck,
            "scale": self.scale,
            "dropout": self.dropout,
            "where": self.dispatch,
        }
        method: Part = (
            AdaptFormer(**adapter)
            if self.experts == 1
            else MoeAdapter(experts=self.experts, normalise=self.normalise, **adapter)
        )
        dispatch = Dispatch(
            rate=self.rate,
            where=self.dispatch,
            temperature=self.temperature,
            rate_weight=self.rate_weight,
            rate_of=self.rate_of,
            complete_weight=self.complete_weight,
            distill_weight=self.distill_weight,
            bias=self.gate_bias,
            explore=self.explore,
            complete_every=self.complete_every,
            complete_share=self.complete_share,
        )
        return method, dispatch
