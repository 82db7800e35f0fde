"""The base of policies that reduce: in front of a unit some tokens are merged, dropped, or hidden while training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from dyntune.backbones.units import Unit
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.base import TokenPolicy


class Reducer(nn.Module):
    """What a reducing policy puts on a unit: it decides there which tokens go on."""

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        """As ``ReducingPolicy.reduction``."""
        raise NotImplementedError


@dataclass(frozen=True)
class ReducingPolicy(TokenPolicy):
    """A policy whose ``install`` puts a ``Reducer`` in front of units, with ``Unit.add_reducer``."""

    def reduces(self, unit: Unit) -> bool:
        return self.name() in unit.reducers

    @property
    def drops(self) -> bool:
        """Whether some patches are dropped for good, instead of being merged into others."""
        return False

    def reduction(self, unit: Unit, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        """Decides what becomes of the tokens in front of ``unit``.

        Args:
            unit: one that this policy ``reduces``.
            tokens: what enters it.
            projected: queries, keys and values of the block's attention, in front of an MLP; None in front of a block.

        Returns:
            A function from tokens of this layout, whatever their features, to those that remain: prefix tokens first
            and unchanged, made with ``Tokens.with_patches`` or ``Tokens.with_present``. None if nothing changes.
        """
        return unit.reducers[self.name()](tokens, projected)
