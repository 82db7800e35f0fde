"""What every token policy offers, and what a forward pass records of its decisions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.tokens import EVERY_PATCH, Provenance, Tokens
from dyntune.parts.policies.course import Course
from dyntune.parts.spec import Part


@dataclass(frozen=True)
class Gate:
    """One decision of a policy: which patches of each image a unit computed.

    Args:
        unit: the gated unit's path, for instance ``blocks.3.mlp``.
        values: ``(B, P)``, 1 for active patches and 0 for skipped ones. While training the values carry the
            straight-through gradient.
        policy: who decided.
        logits: ``(B, P)``, what the decision was made from before noise, where a policy has that.
        provenance: which image patches the P tokens stand for.
        course: what the decision is trained along, where a policy has that; ``course.target`` is the share of active
            patches that it aims at in this step.
    """

    unit: str
    values: Tensor
    policy: TokenPolicy
    logits: Tensor | None = None
    provenance: Provenance = EVERY_PATCH
    course: Course | None = None

    @property
    def there(self) -> Tensor:
        """The values of the tokens that are there: all of them, or, where training hides some, the others, flat."""
        if self.provenance.present is None:
            return self.values
        there = self.values[self.provenance.present > 0.5]
        return there if there.numel() else self.values  # a mean over nothing would be NaN

    @property
    def on_patches(self) -> Tensor:
        """``(B, patches of the image)``: merged patches have the value of their token, dropped ones 0."""
        return self.provenance.of_patches(self.values)


@dataclass(frozen=True)
class Reduction:
    """One reduction of the tokens in front of a unit: some are merged, dropped, or hidden while training.

    Args:
        unit: path of the unit, for instance ``blocks.3.mlp``.
        policy: who decided.
        provenance: which image patches the tokens stand for afterwards.
        count: tokens of an image afterwards, prefix tokens included.
    """

    unit: str
    policy: TokenPolicy
    provenance: Provenance
    count: int


@dataclass(frozen=True)
class Output:
    """What one forward pass gives.

    Args:
        logits: ``(B, classes)``.
        gates: every gate of the pass, from the first block to the last.
        grid: rows and columns of patches in the images.
        reductions: every reduction of the tokens, from the first block to the last.
        tokens: what the head read, behind the last norm.
    """

    logits: Tensor
    gates: tuple[Gate, ...]
    grid: tuple[int, int]
    reductions: tuple[Reduction, ...] = ()
    tokens: Tokens | None = None


@dataclass(frozen=True)
class CompletePass:
    """What training asks of DyT's "complete model": a second pass with the same weights that computes every token.

    With ``every`` and ``share`` below their full values, the expectation of the loss stays what it is.

    Args:
        weight: coefficient of the complete model's own loss. At 0 it is a teacher only and runs without a graph.
        distill: coefficient of the distillation from it.
        every: it runs in every such step, its terms then multiplied by this number.
        share: of the images of a batch, the first ones, that it runs on; its terms are means over those.
        features: coefficient of the distance to the features that its head reads.
    """

    weight: float = 0.0
    distill: float = 0.0
    every: int = 1
    share: float = 1.0
    features: float = 0.0

    @property
    def wanted(self) -> bool:
        """Whether it has any term."""
        return bool(self.weight or self.distill or self.features)

    def joined(self, other: CompletePass) -> CompletePass:
        """One pass that gives both what they ask for: they are about the model, so the larger demand counts, once."""
        if not (self.wanted and other.wanted):
            return self if self.wanted else other
        return CompletePass(
            max(self.weight, other.weight),
            max(self.distill, other.distill),
            min(self.every, other.every),
            max(self.share, other.share),
            max(self.features, other.features),
        )


@dataclass(frozen=True)
class TokenPolicy(Part):
    """A configuration whose ``install`` adds modules to a backbone, and which is asked during a forward pass.

    A policy *gates* units, so that some tokens skip them (``GatingPolicy``), or it *reduces* the tokens in front
    of units, so that fewer go on (``ReducingPolicy``).
    """

    def install(self, backbone: Backbone) -> None:
        """Adds the modules that decide to ``backbone`` in place.

        Raises:
            BackboneError: the policy is not defined on this backbone, or clashes with what is installed.
        """
        raise NotImplementedError

    def gates(self, unit: Unit) -> bool:
        """Whether this policy decides which patches ``unit`` computes."""
        return False

    def reduces(self, unit: Unit) -> bool:
        """Whether this policy decides, in front of ``unit``, which tokens there are from there on.

        In front of a block it sees what enters the block; in front of an MLP also the block's attention.
        """
        return False

    @property
    def settles(self) -> float:
        """Share of a training after which the policy aims at what it will do in evaluation; before, it may do more."""
        return 0.0

    @property
    def follows_length(self) -> bool:
        """Whether what a training does depends on how long it is, so that the length must be told and must not change.

        Learning rates aside.
        """
        return bool(self.settles)

    def complete_pass(self, output: Output) -> CompletePass:
        """What this policy asks of the complete model in a training step.

        Args:
            output: of the step's training pass.
        """
        return CompletePass()

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Weighted terms that this policy adds to the training loss for the decisions of a training pass.

        Args:
            output: of the training pass.
            teacher: what a frozen teacher makes of the same images, where one was given.
        """
        return {}


class Trial(Protocol):
    """The model that is to be, but for one policy: what that policy can find its settings on before anything is built.

    Args:
        dense_macs: MACs per image of the untouched backbone without its head.
    """

    dense_macs: int

    @property
    def depth(self) -> int:
        """Blocks of the backbone."""
        ...

    @property
    def patches(self) -> int:
        """Patches of an image."""
        ...

    def macs(self, spec: str) -> int:
        """MACs per image, without the head, of the model with ``spec`` in the policy's place."""
        ...


@runtime_checkable
class Searching(Protocol):
    """A policy that finds its settings on a trial model before anything is installed."""

    def settle(self, trial: Trial) -> str:
        """The spec of what is to be installed in this policy's place.

        Raises:
            SpecError: what is asked for cannot be had on this backbone.
        """
        ...


@runtime_checkable
class Weighing(Protocol):
    """A policy that wants to know, before the first step of a training, what the units are worth that it gates."""

    def unweighed(self, backbone: Backbone) -> list[Unit]:
        """The units of which it wants to know it now."""
        ...

    def weigh(self, changes: Mapping[Unit, float]) -> None:
        """Takes, for each of them, how much the features change when no patch goes through it (``model.worth``)."""
        ...


@runtime_checkable
class Fitting(Protocol):
    """A policy that fits what stands in for the units that it gates, before patches skip any."""

    @property
    def passing(self) -> float:
        """The share of the patches that will go through a unit."""
        ...

    def unfitted(self, backbone: Backbone) -> list[Unit]:
        """The units for which it wants to do so now."""
        ...

    def fit(self, unit: Unit, patches: Tensor, wanted: Tensor) -> None:
        """Takes what enters one of them, and what must be added, both ``(B, P, C)`` (``model.worth``)."""
        ...


@runtime_checkable
class Distilling(Protocol):
    """A policy whose loss may have terms that need a teacher."""

    @classmethod
    def name(cls) -> str: ...

    def distills(self) -> bool:
        """Whether its loss, as it is configured, has such terms."""
        ...

    def check_teacher(self, backbone: Backbone, teacher: Backbone) -> None:
        """Checks that this policy can learn from a teacher with that backbone.

        Raises:
            BackboneError: it cannot.
        """
        ...


def learners(policies: Iterable[TokenPolicy]) -> list[Distilling]:
    """Those of some policies that learn from a teacher."""
    return [policy for policy in policies if isinstance(policy, Distilling) and policy.distills()]
