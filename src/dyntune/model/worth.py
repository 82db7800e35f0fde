"""What units do in a model as it is, and what each is worth: how much the features change when patches skip it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.errors import BackboneError
from dyntune.core.processes import mean_over_processes
from dyntune.core.tokens import Tokens
from dyntune.model.executions import Compact
from dyntune.model.forward import run
from dyntune.parts.policies.base import Gate, TokenPolicy
from dyntune.parts.policies.gating import GatingPolicy

IMAGES = 32
"""Of a batch, the most that are looked at: each unit costs a forward pass."""


@dataclass(frozen=True)
class _Fixed(GatingPolicy):
    """Lets every patch through some units, or none; others have no gate."""

    paths: tuple[str, ...] = ()
    through: bool = False

    def gates(self, unit: Unit) -> bool:
        return unit.path in self.paths

    def gate(self, unit: Unit, tokens: Tokens) -> Gate:
        values = tokens.patches.new_full(tokens.patches.shape[:2], float(self.through))
        return Gate(unit.path, values, self, provenance=tokens.provenance)


class _Shown(Compact):
    """Computes every token, and shows what gated units read and add.

    Args:
        see: called with the unit, what enters it and what it adds, both ``(B, P, C)``.
    """

    def __init__(self, see: Callable[[Unit, Tensor, Tensor], None]) -> None:
        self.see = see

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        tokens = unit.with_norm(tokens)
        update = unit.update(tokens)
        self.see(unit, tokens.patches, update[:, tokens.prefix :])
        parallel = unit.parallel_update(tokens)
        x = tokens.x + update
        return tokens.with_x(x if parallel is None else x + parallel), policy.gate(unit, tokens)


@torch.no_grad()
def show_units(
    backbone: Backbone, units: Sequence[Unit], see: Callable[[Unit, Tensor, Tensor], None], images: Tensor
) -> None:
    """Runs images through a model, every patch through every unit, and shows what some units do.

    Args:
        backbone: in eval mode, with what is installed on it.
        units: those that are shown.
        see: called with each of them, what enters it and what it adds, of the patches, both ``(B, P, C)``.
        images: ``(B, 3, height, width)``, preprocessed; the first ``IMAGES`` of them are used.
    """
    watched = _Fixed(tuple(unit.path for unit in units), through=True)
    run(backbone, (watched,), images[:IMAGES], _Shown(see))


@torch.no_grad()
def unit_worth(backbone: Backbone, units: Sequence[Unit], images: Tensor) -> dict[Unit, float]:
    """How much the features that the head reads change when the patches skip one of some units, and no other.

    Processes that train together get what one that has seen all their images would.

    Args:
        backbone: in eval mode, with what is installed on it.
        units: those to skip, one at a time. Adapters beside a unit still see every token.
        images: ``(B, 3, height, width)``, preprocessed; the first ``IMAGES`` of them are used.

    Returns:
        The norm of the change as a share of the norm of the features, for each unit.
    """
    images = images[:IMAGES]
    whole = _features(backbone, (), images)
    without = [_features(backbone, (_Fixed((unit.path,)),), images) for unit in units]
    squares = torch.stack([whole.square().sum(), *((features - whole).square().sum() for features in without)])
    squares = mean_over_processes(squares)
    return dict(zip(units, (squares[1:] / squares[0]).sqrt().tolist(), strict=True))


def _features(backbone: Backbone, policies: Sequence[TokenPolicy], images: Tensor) -> Tensor:
    tokens = run(backbone, policies, images, Compact()).tokens
    assert tokens is not None  # run() gives them
    try:
        return backbone.pooled(tokens).float()
    except BackboneError:  # a head of another kind, such as one that reads every patch
        return tokens.x.float()
