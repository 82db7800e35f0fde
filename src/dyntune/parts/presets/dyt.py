"""Dynamic Tuning (DyT): adapters that see every token, and dispatch that lets the rest of the work be skipped."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dyntune.backbones.units import Where
from dyntune.parts.methods.adaptformer import AdaptFormer
from dyntune.parts.methods.moe_adapter import MoeAdapter, Normalise
from dyntune.parts.policies.dispatch import RECIPES, Chosen, Dispatch, RateOf, Recipe
from dyntune.parts.presets.base import Preset
from dyntune.parts.spec import Part


@dataclass(frozen=True)
class DyT(Preset):
    """Dynamic Tuning: ``adaptformer`` (or ``moe-adapter``) and ``dispatch`` on the same units of the frozen backbone.

    With z the residual stream after attention, M the mask and A the adapter, a block with MLP dispatch gives
    ``z + M * mlp(norm2(z)) + (1 - M) * S(z) + A(z)``, with S the surrogate; as published there is none.

    Args:
        dispatch: the units that are gated and get an adapter. The paper calls them MLP, Attention, Attention-MLP,
            Layer.
        experts: 1 for a plain adapter, more for the MoE-adapter.
        scale: factor on the adapter's output, or "learnable" for a trained one; 1 in the recipe steady, which small
            data sets want, 0.1 as published.
        gate_bias: logit that all gates start at: 2 in steady, where they start open, 0 as published.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808"
    parts: ClassVar[tuple[type[Part], ...]] = (AdaptFormer, MoeAdapter, Dispatch)

    rate: float | tuple[float, float] = Dispatch.rate
    dispatch: Where = Dispatch.where
    recipe: Recipe = Dispatch.recipe
    bottleneck: int = AdaptFormer.bottleneck
    scale: float | Literal["learnable"] | Chosen = "recipe"
    dropout: float = AdaptFormer.dropout
    temperature: float = Dispatch.temperature
    experts: int = 1
    normalise: Normalise = MoeAdapter.normalise
    gate_bias: float | Chosen = Dispatch.bias
    lead: tuple[float, ...] | Chosen | None = Dispatch.lead
    spread: float | Chosen | None = Dispatch.spread
    course: tuple[float, ...] | Chosen = Dispatch.course
    quiet: float | Chosen | None = Dispatch.quiet
    moves: tuple[float, ...] | Chosen | None = Dispatch.moves
    rate_weight: float | tuple[float, ...] | Chosen = Dispatch.rate_weight
    rate_of: RateOf | Chosen = Dispatch.rate_of
    complete_weight: float = Dispatch.complete_weight
    distill_weight: float = Dispatch.distill_weight
    feature_weight: float | Chosen = Dispatch.feature_weight
    explore: float | Chosen | None = Dispatch.explore
    complete_every: int = Dispatch.complete_every
    complete_share: float = Dispatch.complete_share
    complete_during: tuple[float, ...] | Chosen = Dispatch.complete_during
    surrogate: float | Chosen | None = Dispatch.surrogate

    @classmethod
    def completed(cls, options: dict[str, Any]) -> dict[str, Any]:
        return Dispatch.completed(options)

    def check(self) -> None:
        self.require(self.experts >= 1, "at least 1 expert")
        super().check()

    def expand(self) -> tuple[Part, ...]:
        adapter = AdaptFormer if self.experts == 1 else MoeAdapter
        scale = RECIPES[self.recipe]["scale"] if self.scale == "recipe" else self.scale
        return (
            adapter(**self.options_of(adapter) | {"scale": scale}, where=self.dispatch),
            Dispatch(**self.options_of(Dispatch), where=self.dispatch, bias=self.gate_bias),
        )
