"""What every token policy offers: which tokens each unit computes, and what training adds to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dyntune.backbones.base import Backbone, Unit
from dyntune.errors import BackboneError
from dyntune.spec import Part
from dyntune.tokens import Tokens


@dataclass(frozen=True)
class Gate:
    """One decision of a policy: which patches of each image a unit computed.

    Args:
        unit: the gated unit's path, for instance ``blocks.3.mlp``.
        values: ``(B, P)``, 1 for active patches and 0 for skipped ones. While training the values carry the
            straight-through gradient.
        policy: who decided.
        logits: ``(B, P)``, what the decision was made from before noise, where a policy has that.
    """

    unit: str
    values: Tensor
    policy: TokenPolicy
    logits: Tensor | None = None


@dataclass(frozen=True)
class Output:
    """What one forward pass gives.

    Args:
        logits: ``(B, classes)``.
        gates: every gate of the pass, from the first block to the last.
        grid: rows and columns of patches in the images.
    """

    logits: Tensor
    gates: tuple[Gate, ...]
    grid: tuple[int, int]


@dataclass(frozen=True)
class TokenPolicy(Part):
    """A configuration whose ``install`` adds modules to a backbone, and which is asked during a forward pass."""

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
        """Which patches a gated ``unit`` computes. Skipped tokens get no update."""
        raise NotImplementedError

    def target_rate(self, unit: Unit) -> float:
        """Share of patches that a gated ``unit`` is meant to compute; what is counted when no images are given."""
        raise NotImplementedError

    def complete_weights(self) -> tuple[float, float]:
        """Coefficients of the complete model's own loss and of the distillation from it.

        Both are about the model, not about a policy: of several policies the largest coefficients count, once.
        """
        return 0.0, 0.0

    def loss_terms(self, output: Output) -> dict[str, Tensor]:
        """Weighted terms that this policy adds to the training loss for the gates of a training pass."""
        return {}


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
            "a bypass lets no gradient into the backbone, so "
            f"{policies[0].name() if policies else trained[0]} would never learn. Give the bypass alone."
        )
