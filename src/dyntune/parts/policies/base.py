"""What every token policy offers: which tokens each unit computes, and what training adds to the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import EVERY_PATCH, Sources, Tokens
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
        sources: which image patches the P tokens stand for.
        target: share of active patches that this pass is trained towards, where it changes from step to step.
    """

    unit: str
    values: Tensor
    policy: TokenPolicy
    logits: Tensor | None = None
    sources: Sources = EVERY_PATCH
    target: float | None = None

    @property
    def there(self) -> Tensor:
        """The values of the tokens that are there: all of them, or, where training hides some, the others, flat."""
        if self.sources.present is None:
            return self.values
        there = self.values[self.sources.present > 0.5]
        return there if there.numel() else self.values  # a mean over nothing would be NaN

    @property
    def on_patches(self) -> Tensor:
        """``(B, patches of the image)``: merged patches have the value of their token, dropped ones 0."""
        return self.sources.of_patches(self.values)


@dataclass(frozen=True)
class Reduction:
    """One reduction of the tokens in front of a unit: some are merged, dropped, or hidden while training.

    Args:
        unit: path of the unit, for instance ``blocks.3.mlp``.
        policy: who decided.
        sources: which image patches the tokens stand for afterwards.
        count: tokens of an image afterwards, prefix tokens included.
    """

    unit: str
    policy: TokenPolicy
    sources: Sources
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
    """

    weight: float = 0.0
    distill: float = 0.0
    every: int = 1
    share: float = 1.0

    @property
    def wanted(self) -> bool:
        """Whether it has any term."""
        return bool(self.weight or self.distill)

    def joined(self, other: CompletePass) -> CompletePass:
        """One pass that gives both what they ask for: they are about the model, so the larger demand counts, once."""
        if not (self.wanted and other.wanted):
            return self if self.wanted else other
        return CompletePass(
            max(self.weight, other.weight),
            max(self.distill, other.distill),
            min(self.every, other.every),
            max(self.share, other.share),
        )


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


@dataclass(frozen=True)
class TokenPolicy(Part):
    """A configuration whose ``install`` adds modules to a backbone, and which is asked during a forward pass.

    A policy *gates* units, so that skipped tokens get no update, or it *reduces* the tokens in front of units, so that
    fewer go on.
    """

    def settle(self, trial: Trial) -> str | None:
        """The spec of what is to be installed in this policy's place; None for the policy itself.

        Raises:
            SpecError: what is asked for cannot be had on this backbone.
        """
        return None

    def install(self, backbone: Backbone) -> None:
        """Adds the modules that decide to ``backbone`` in place.

        Raises:
            BackboneError: the policy is not defined on this backbone, or clashes with what is installed.
        """
        raise NotImplementedError

    def gates(self, unit: Unit) -> bool:
        """Whether this policy decides which patches ``unit`` computes."""
        return False

    def gate(self, unit: Unit, tokens: Tokens) -> Gate:
        """Which patches a gated ``unit`` computes, with ``tokens.sources``. Skipped tokens get no update."""
        raise NotImplementedError

    def linear_gate(self, unit: Unit) -> nn.Linear | None:
        """The linear map from a token of a gated ``unit`` to one number, where nothing else enters the decision.

        Fast inference computes it together with other maps of the token and asks ``gate_from`` instead of ``gate``.
        """
        return None

    def gate_from(self, unit: Unit, tokens: Tokens, values: Tensor) -> Gate:
        """As ``gate``, from what ``linear_gate`` makes of the patches, ``(B, P)``."""
        raise NotImplementedError

    def target_rate(self, unit: Unit) -> float:
        """Share of patches that a gated ``unit`` is meant to compute; what is counted when no images are given."""
        raise NotImplementedError

    def reduces(self, unit: Unit) -> bool:
        """Whether this policy decides, in front of ``unit``, which tokens there are from there on.

        In front of a block it sees what enters the block; in front of an MLP also the block's attention.
        """
        return False

    @property
    def drops(self) -> bool:
        """Whether some patches are dropped for good, instead of being merged into others."""
        return False

    def reduction(
        self, unit: Unit, tokens: Tokens, projected: tuple[Tensor, Tensor, Tensor] | None
    ) -> Callable[[Tokens], Tokens] | None:
        """Decides what becomes of the tokens in front of ``unit``.

        Args:
            unit: one that this policy ``reduces``.
            tokens: what enters it.
            projected: queries, keys and values of the block's attention, each ``(B, N, H, D)``, in front of an MLP;
                None in front of a block.

        Returns:
            A function from tokens of this layout, whatever their features, to those that remain: prefix tokens first
            and unchanged, made with ``Tokens.with_patches`` or ``Tokens.with_present``. None if nothing changes.
        """
        raise NotImplementedError

    def explored(self, unit: Unit) -> float | None:
        """Share of the patches that a gated ``unit`` skips which training computes all the same, to teach the gate.

        Above 0 and at most 1; None computes every patch and multiplies by the gate.
        """
        return None

    def complete_pass(self) -> CompletePass:
        """What this policy asks of the complete model while training."""
        return CompletePass()

    def distills(self) -> bool:
        """Whether this policy's loss has terms that need a teacher."""
        return False

    def check_teacher(self, backbone: Backbone, teacher: Backbone) -> None:
        """Checks that this policy can learn from a teacher with that backbone.

        Raises:
            BackboneError: it cannot.
        """

    def loss_terms(self, output: Output, teacher: Output | None) -> dict[str, Tensor]:
        """Weighted terms that this policy adds to the training loss for the decisions of a training pass.

        Args:
            output: of the training pass.
            teacher: what a frozen teacher makes of the same images, where one was given.
        """
        return {}


class Reducer(nn.Module):
    """What a reducing policy puts on a unit: it decides there which tokens go on."""

    def forward(
        self, tokens: Tokens, projected: tuple[Tensor, Tensor, Tensor] | None
    ) -> Callable[[Tokens], Tokens] | None:
        """As ``TokenPolicy.reduction``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReducingPolicy(TokenPolicy):
    """A policy whose ``install`` puts a ``Reducer`` in front of units, with ``Unit.add_reducer``."""

    def reduces(self, unit: Unit) -> bool:
        return self.name() in unit.reducers

    def reduction(
        self, unit: Unit, tokens: Tokens, projected: tuple[Tensor, Tensor, Tensor] | None
    ) -> Callable[[Tokens], Tokens] | None:
        return unit.reducers[self.name()](tokens, projected)


def check_gates(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that everything installed on a backbone can run under its gates.

    Raises:
        BackboneError: two gates decide about the same unit, or a gate around a block hides tokens from a module in it
            that looks at all of them.
    """
    for block in backbone.blocks:
        gated = [unit for policy in policies for unit in (block, block.attn, block.mlp) if policy.gates(unit)]
        if len(gated) != len(set(gated)) or (block in gated and len(gated) > 1):
            paths = " and ".join(sorted({unit.path for unit in gated}))
            raise BackboneError(
                f"{paths}: several gates at the same time. Give one gate per unit, and either "
                "for a whole layer or for its sub-layers; dyt contains dispatch."
            )
        for inner in (block.attn, block.mlp) if block in gated else ():
            for name, module in inner.beside.items():
                if not getattr(module, "tokenwise", True):
                    raise BackboneError(
                        f"{name} at {inner.path} looks at all tokens of an image, but a gate around the layer shows it "
                        "the active ones only. Gate the sub-layers instead (where=attn, mlp or attn-mlp), or put it "
                        "beside the whole layer if it can stand there."
                    )


def check_reductions(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that everything installed on a backbone can run where tokens are merged, dropped or hidden.

    Raises:
        BackboneError: two policies reduce tokens, a gate hides from the reducing one what it reads, or a module or
            the head needs the whole grid of patches.
    """
    reducing = [policy for policy in policies if any(map(policy.reduces, backbone.all_units()))]
    if len(reducing) > 1:
        names = " and ".join(policy.name() for policy in reducing)
        raise BackboneError(f"{names} would each decide which tokens there are; give one of them.")
    for policy in reducing:
        for block in backbone.blocks:
            gated = next((unit for unit in (block, block.attn) if any(other.gates(unit) for other in policies)), None)
            if gated is not None and policy.reduces(block.mlp):
                raise BackboneError(
                    f"{policy.name()} reads queries and keys of all tokens in {block.attn.path}, which a gate at "
                    f"{gated.path} does not compute for skipped tokens. Gate the MLP (dispatch:where=mlp, "
                    "dyt:dispatch=mlp)."
                )
        if policy.drops and backbone.head_reads_grid:
            raise BackboneError(
                f"{policy.name()} drops patches, but the backbone's head reads every one of them. Use a policy that "
                "merges (tome, pyra, fpet, evit with fuse=true) or dispatch, which keeps every token."
            )
        for unit in backbone.all_units():
            for name, module in unit.beside.items():
                if getattr(module, "reads_grid", False):
                    raise BackboneError(
                        f"{name} at {unit.path} needs every patch in its place in the grid, which {policy.name()} "
                        "does not leave there. Use dispatch, which keeps every token, or another method."
                    )


def check_bypass(backbone: Backbone, policies: Sequence[TokenPolicy]) -> None:
    """Checks that nothing which a bypass cuts off waits for a gradient.

    Raises:
        BackboneError: a gate, or a trained parameter, stands before the output of the last block.
    """
    if backbone.bypass is None:
        return
    behind = {*backbone.bypass.parameters(), *(p for head in backbone.heads for p in head.parameters())}
    trained = [name for name, p in backbone.named_parameters() if p.requires_grad and p not in behind]
    if policies or trained:
        raise BackboneError(
            "a bypass reads every token behind each block and lets no gradient into the backbone, so "
            f"{policies[0].name() if policies else trained[0]} cannot stand beside it. Give the bypass alone."
        )
