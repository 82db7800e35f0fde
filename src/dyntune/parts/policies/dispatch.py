"""Token dispatch (DyT): a linear gate per unit lets informative tokens through; the others skip the unit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit, Where
from dyntune.core.losses import rate_loss
from dyntune.core.tokens import Tokens
from dyntune.parts.policies.base import CompletePass, Gate, Output
from dyntune.parts.policies.course import Course
from dyntune.parts.policies.dispatcher import Dispatcher
from dyntune.parts.policies.gating import GatingPolicy, straight_through
from dyntune.parts.policies.surrogate import Surrogate

Recipe = Literal["steady", "published"]
Chosen = Literal["recipe"]
"""The value of an option that the recipe decides."""
RateOf = Literal["training", "inference"]

RECIPES: dict[Recipe, dict[str, Any]] = {
    "steady": {
        "bias": 2.0,
        "moves": (6.0, 15.0),
        "course": (0.1, 0.6),
        "quiet": 0.0,
        "rate_of": "inference",
        "rate_weight": (10.0, 100.0),
        "explore": 0.1,
        "complete_during": (0.4, 0.8),
        "lead": (1.0, 3.0),
        "spread": 0.5,
        "feature_weight": 10.0,
        "surrogate": 0.04,
        "scale": 1.0,
    },
    "published": {
        "bias": 0.0,
        "moves": None,
        "course": (0.0, 0.0),
        "quiet": None,
        "rate_of": "training",
        "rate_weight": 2.0,
        "explore": None,
        "complete_during": (0.0, 1.0),
        "lead": None,
        "spread": None,
        "feature_weight": 0.0,
        "surrogate": None,
        "scale": 0.1,
    },
}
"""What each recipe chooses for the options that are left to it, ``scale`` among those of the preset ``dyt``."""


@dataclass(frozen=True)
class Dispatch(GatingPolicy):
    """Gates units by a learned linear dispatcher, trained towards a target activation rate (DyT).

    Class and register tokens are always active. Where attention is gated, active tokens attend to active tokens only,
    in training as in inference. Each gated unit adds ``D + 1`` parameters and D MACs per patch, and a surrogate's MACs.

    With two rates the gates are elastic: every training step draws its target between them, all rates alike, and each
    gate learns how far its logits move with it, one more parameter per gated unit. In evaluation they aim at the middle
    until ``TunedModel.set_rate`` says another rate.

    How gates are trained is a recipe. ``published`` is the paper's. ``steady`` keeps its losses, has the complete model
    run while gates close only, and changes what makes short trainings fail (``docs/dyt.md`` has the reasons): gates
    start open, furthest where the model needs the unit most, the target falls to the rate over the training, gates
    decide without noise, the rate loss holds what inference computes, and the pace of the gates follows the length of
    the training, which ``fit`` tells and ``begin_training`` tells for a loop of your own. An option that is left at
    "recipe" is chosen by it.

    Args:
        rate: target share of active patches, the mean over all gated units, between 0 and 1; or the lowest and the
            highest of a range, 0.3/0.9.
        where: the gated units. attn-mlp gates both sub-layers of a block separately, layer the block as a whole.
        recipe: what chooses the options that are left to it: steady, or published.
        temperature: of the Gumbel-sigmoid; it shapes the gradient only.
        bias: logit that all gates start at. 0, as published, starts with about half of the patches active everywhere;
            steady starts at 2, and gates close where that costs least.
        lead: logits by which a gate starts further open for each doubling, over the median of the gates, of how much
            the features change when its unit is skipped, and the most of them; measured before the first step. 1/3
            in steady; none, as published, starts all gates alike.
        spread: standard deviation of a gate's logits over the patches of the first batch, around what they start at, so
            that patches are told apart from the first step on, whatever the size of the features; 0.5 in steady. None,
            as published, leaves weights as they are drawn, and the mean of the logits to chance.
        course: shares of the training until which the target is 1, and after which it is the rate; between, it falls
            along half a cosine. 0.1/0.6 in steady, 0/0 as published.
        quiet: share of the training after which gates decide without noise, which falls linearly until then; 0 in
            steady, no noise at all; none, as published, keeps the noise to the end.
        moves: how far the bias, and the weights, of a gate may move its logit in as many steps of Adam at the peak
            learning rate as the training has, whatever that rate and the features; a warm-up and a cosine leave half of
            it. 6/15 in steady; none, as published, lets the learning rate decide.
        rate_weight: coefficient of the rate loss, the squared distance of the mean activation to the target; 2 as
            published. Two numbers are that of the course, and that of the end of the training, to which it grows from
            the end of the course: 10/100 in steady. With a course of 0/0 it grows all the time, with one that ends at
            1 never.
        rate_of: the activation that the rate loss holds to the target: the noisy gates' of training, as published, or
            that of inference, which decides without noise, as in steady. The two differ by several points after a
            short training.
        complete_weight: coefficient of the complete-model loss: the task's loss with every token computed.
        distill_weight: coefficient of the distillation from the complete model to the dispatched one.
        feature_weight: coefficient of the distance between the features that the head reads of the dispatched model and
            of the complete one, beyond 4 % of the latter's square (``core.losses.feature_loss``): logits of training
            images say little about images that a model has not seen. It is multiplied by how well the complete model
            knows the images of the step (``core.losses.trust``). 10 in steady; 0, as published, compares logits alone.
        explore: while training, share of the skipped patches that an MLP computes, at random, for the gradient of their
            gates; above 0 and at most 1. The loss is the same, and so is the expected gradient; 1 gives the published
            gradient itself and saves the backward pass through skipped patches. 0.1 in steady; none, as published,
            computes all, as gates of other units always do.
        complete_every: steps per pass of the complete model, whose loss terms then count so many times.
        complete_share: share of each batch that the complete model runs on, above 0 and at most 1.
        complete_during: shares of the training between which the complete model runs: as long as the gates are open, it
            is the dispatched model itself. 0.4/0.8 in steady, when they close and have just closed; 0/1, as published,
            is always. Where nobody says how long the training is, it runs in every step.
        surrogate: rank, as a share of the width C, of a linear map that stands in for a unit at the patches that skip
            it: the best one of that rank for some images before the first step of a training whose length is known
            (``model.worth.fit_units``), not trained, saved with the adapter. It adds ``2 C rank`` MACs per patch. 0.04
            in steady; none, as published, lets skipped patches go without the unit's update.
    """

    source: ClassVar[str] = "Zhao et al., NeurIPS 2024, arXiv 2403.11808, sections 3.2 and 3.3"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.mlp_token_select\.mlp_head\.": r"blocks.\1.mlp.dispatcher.gate."
    }

    rate: float | tuple[float, float] = 0.5
    where: Where = "mlp"
    recipe: Recipe = "steady"
    temperature: float = 5.0
    bias: float | Chosen = "recipe"
    lead: tuple[float, ...] | Chosen | None = "recipe"
    spread: float | Chosen | None = "recipe"
    course: tuple[float, ...] | Chosen = "recipe"
    quiet: float | Chosen | None = "recipe"
    moves: tuple[float, ...] | Chosen | None = "recipe"
    rate_weight: float | tuple[float, ...] | Chosen = "recipe"
    rate_of: RateOf | Chosen = "recipe"
    complete_weight: float = 1.0
    distill_weight: float = 1.0
    feature_weight: float | Chosen = "recipe"
    explore: float | Chosen | None = "recipe"
    complete_every: int = 1
    complete_share: float = 1.0
    complete_during: tuple[float, ...] | Chosen = "recipe"
    surrogate: float | Chosen | None = "recipe"

    @classmethod
    def completed(cls, options: dict[str, Any]) -> dict[str, Any]:
        # Files of some versions name an option that is no more, and that only a training read.
        options = {name: value for name, value in options.items() if name != "complete_course"}
        if "recipe" in options:
            # Files that do not know these were trained without.
            return {"surrogate": None, "feature_weight": 0.0} | options
        # Files that know no recipes have the published one, and write its options out.
        published = RECIPES["published"]
        own = {name: value for name, value in options.items() if name not in published or value != published[name]}
        return {"recipe": "published"} | own

    def chosen(self, option: str) -> Any:
        """The value of an option, the recipe's where it is left to it."""
        value = getattr(self, option)
        return RECIPES[self.recipe][option] if value == "recipe" else value

    def settled(self) -> Dispatch:
        options = {name: self.chosen(name) for name in RECIPES[self.recipe] if hasattr(self, name)}
        if self.where not in ("mlp", "attn-mlp"):
            options["explore"] = None
        return replace(self, **options)

    @property
    def rate_weights(self) -> tuple[float, ...]:
        """Coefficients of the rate loss, until the end of the course and at the end of the training."""
        weight = self.chosen("rate_weight")
        return weight if isinstance(weight, tuple) else (weight, weight)

    @property
    def middle(self) -> float:
        """The rate, or the middle of the range."""
        return sum(self.rate) / 2 if isinstance(self.rate, tuple) else self.rate

    def check(self) -> None:
        if isinstance(self.rate, tuple):
            self.require(len(self.rate) == 2, "one rate, or the lowest and the highest of a range")
            self.require(0 < self.rate[0] < self.rate[1] < 1, "two rates above 0 and below 1, the lower one first")
        else:
            self.require(0 <= self.rate <= 1, "rate between 0 and 1")
        self.require(self.temperature > 0, "temperature above 0")
        weights = (*self.rate_weights, self.complete_weight, self.distill_weight, self.chosen("feature_weight"))
        self.require(min(weights) >= 0, "loss weights of at least 0")
        self.require(len(self.rate_weights) == 2, "one rate_weight, or that of the course and that of the end")
        course, quiet, moves, lead = map(self.chosen, ("course", "quiet", "moves", "lead"))
        self.require(
            len(course) == 2 and 0 <= course[0] <= course[1] <= 1,
            "as course two shares of the training between 0 and 1, the lower one first",
        )
        self.require(quiet is None or 0 <= quiet <= 1, "quiet between 0 and 1, or none")
        self.require(moves is None or (len(moves) == 2 and min(moves) > 0), "as moves two numbers above 0, or none")
        spread = self.chosen("spread")
        self.require(spread is None or spread > 0, "spread above 0, or none")
        surrogate = self.chosen("surrogate")
        self.require(surrogate is None or 0 < surrogate <= 1, "surrogate above 0 and at most 1, or none")
        self.require(lead is None or (len(lead) == 2 and min(lead) > 0), "as lead two numbers above 0, or none")
        explore = self.chosen("explore")
        self.require(explore is None or 0 < explore <= 1, "explore above 0 and at most 1, or none")
        self.require(
            self.explore in (None, "recipe") or self.where in ("mlp", "attn-mlp"),
            "explore only on mlp or attn-mlp, where MLPs have gates of their own; other units are computed whole",
        )
        during = self.chosen("complete_during")
        self.require(
            len(during) == 2 and 0 <= during[0] <= during[1] <= 1,
            "as complete_during two shares of the training between 0 and 1, the lower one first",
        )
        self.require(self.complete_every >= 1, "complete_every of at least 1")
        self.require(0 < self.complete_share <= 1, "complete_share above 0 and at most 1")

    def install(self, backbone: Backbone) -> None:
        low, high = self.rate if isinstance(self.rate, tuple) else (self.rate, self.rate)
        # Named by its units, because several dispatches may stand on different ones.
        course = Course((low, high), self.chosen("course"), self.chosen("quiet"))
        backbone.shared[f"{self.name()}-{self.where}"] = course
        super().install(backbone)
        for unit in filter(self.gates, backbone.all_units()):
            self.learned(unit).follow(course)
            if (share := self.chosen("surrogate")) is not None:
                unit.surrogate = Surrogate(unit.width, max(1, round(share * unit.width)))

    def make_gate(self, unit: Unit) -> Dispatcher:
        return Dispatcher(
            unit.width,
            self.temperature,
            self.chosen("bias"),
            elastic=isinstance(self.rate, tuple),
            moves=self.chosen("moves"),
            spread=self.chosen("spread"),
        )

    def gates(self, unit: Unit) -> bool:
        return unit.kind == self.where or (self.where == "attn-mlp" and unit.kind != "layer")

    def linear_gate(self, unit: Unit) -> nn.Linear | None:
        return self.learned(unit).linear

    def decision(self, unit: Unit, tokens: Tokens, logits: Tensor) -> Gate:
        return replace(super().decision(unit, tokens, logits), course=self.learned(unit).course)

    def learned(self, unit: Unit) -> Dispatcher:
        return cast(Dispatcher, unit.dispatcher)

    def target_rate(self, unit: Unit) -> float:
        rate = self.learned(unit).rate
        if rate is None:
            return self.middle
        return rate

    def explored(self, unit: Unit) -> float | None:
        return self.chosen("explore")

    def unfitted(self, backbone: Backbone) -> list[Unit]:
        if self.chosen("surrogate") is None:
            return []
        units = filter(self.gates, backbone.all_units())
        # Around gates that have been trained, adapters already make up for what skipped patches lack.
        return [unit for unit in units if self.stands_in(unit).unfitted and self.learned(unit).unweighed]

    @property
    def passing(self) -> float:
        return self.middle

    def fit(self, unit: Unit, patches: Tensor, wanted: Tensor) -> None:
        self.stands_in(unit).fit(patches, wanted)

    def stands_in(self, unit: Unit) -> Surrogate:
        """The surrogate of a gated unit."""
        return cast(Surrogate, unit.surrogate)

    def unweighed(self, backbone: Backbone) -> list[Unit]:
        if self.chosen("lead") is None:
            return []
        return [unit for unit in backbone.all_units() if self.gates(unit) and self.learned(unit).unweighed]

    def weigh(self, changes: Mapping[Unit, float]) -> None:
        strength, most = self.chosen("lead")
        middle = median(changes.values())
        for unit, change in changes.items():
            doublings = math.log2(change / middle) if change > middle > 0 else 0.0
            self.learned(unit).open_further(min(strength * doublings, most))

    @property
    def settles(self) -> float:
        fallen = self.chosen("course")[1]
        # Gates follow the target, so they have half of what is left to reach it.
        return max((1 + fallen) / 2 if fallen else 0.0, self.chosen("quiet") or 0.0)

    @property
    def follows_length(self) -> bool:
        first, last = self.rate_weights
        started = any(self.chosen(name) is not None for name in ("lead", "spread", "moves", "surrogate"))
        always = self.chosen("complete_during") == (0, 1)
        return super().follows_length or first != last or started or not always

    def complete_pass(self, output: Output) -> CompletePass:
        course = next((gate.course for gate in output.gates if gate.policy is self), None)
        if course is not None and not course.between(*self.chosen("complete_during")):
            return CompletePass()
        features = self.chosen("feature_weight")
        return CompletePass(
            self.complete_weight, self.distill_weight, self.complete_every, self.complete_share, features
        )

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        own = [gate for gate in output.gates if gate.policy is self]
        if not any(self.rate_weights) or not own:
            return {}
        course = own[0].course
        target, late = (self.middle, 0.0) if course is None else (course.target, course.late)
        first, last = self.rate_weights
        return {"rate": (first + (last - first) * late) * rate_loss([self._held(gate) for gate in own], target)}

    def _held(self, gate: Gate) -> Tensor:
        """The gate whose mean the rate loss holds to the target."""
        if self.chosen("rate_of") == "training" or gate.logits is None:
            return gate.there
        return replace(gate, values=straight_through(gate.logits, self.temperature)).there
