"""What units do in a model as it is, and what each is worth: how much the features change when patches skip it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Unit
from dyntune.core.processes import mean_over_processes
from dyntune.core.tokens import Tokens
from dyntune.model.executions import Compact
from dyntune.model.features import features
from dyntune.model.forward import run
from dyntune.parts.policies.base import Gate, TokenPolicy
from dyntune.parts.policies.gating import GatingPolicy

IMAGES = 32
"""The most that are looked at: each unit costs a forward pass."""


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


class _Twins(Compact):
    """Computes a batch whose halves are the same images: patches of the first half go through every unit.

    In the second half a random share of them does, another one in each unit; the others get what its surrogate adds,
    as it is once ``see`` has been called.

    Args:
        share: of the patches that go through a unit.
        see: called with the unit, what enters it in the second half, and what must be added there for the patches to
            be what they are in the first, ``(B, P, C)`` both.
    """

    def __init__(self, share: float, see: Callable[[Unit, Tensor, Tensor], None]) -> None:
        self.share = share
        self.see = see
        self.random = torch.Generator().manual_seed(0)

    def gated(self, unit: Unit, tokens: Tokens, policy: GatingPolicy) -> tuple[Tokens, Gate]:
        gate = policy.gate(unit, tokens)
        every = gate.values.chunk(2)[0]
        random = torch.rand(every.shape, generator=self.random).to(every.device) < self.share
        gate = replace(gate, values=torch.cat([every, random.to(every.dtype)]))
        tokens = unit.with_norm(tokens)
        update = unit.update(tokens)
        parallel = unit.parallel_update(tokens)
        beside = tokens.x if parallel is None else tokens.x + parallel
        # In fp32: the difference of two streams may be far smaller than what their precision resolves.
        whole, half = beside.float().chunk(2)
        wanted = update.float().chunk(2)[0] + (whole - half)
        self.see(unit, tokens.patches.chunk(2)[1], wanted[:, tokens.prefix :])
        mask = tokens.cover_prefix(gate.values)
        x = beside + update * mask.unsqueeze(-1)
        skipped = unit.skipped_update(tokens, mask)
        return tokens.with_x(x if skipped is None else x + skipped), gate


@torch.no_grad()
def fit_units(
    backbone: Backbone,
    units: Sequence[Unit],
    share: float,
    fit: Callable[[Unit, Tensor, Tensor], None],
    images: Tensor,
) -> None:
    """Fits what stands in for units, one after the other, so that features come out as if no patch had skipped any.

    What is fitted to a unit alone leaves an error, which the units behind it were never shown, and add theirs to.
    Here each is fitted to what skipping has left of the features in front of it, and to what they would be behind it.
    Units of other policies compute every patch meanwhile, and active patches attend to all.

    Args:
        backbone: in eval mode, with what is installed on it.
        units: those that patches skip.
        share: of the patches that go through each of them, at random.
        fit: called with each unit, what enters it and what is to be added, of the patches, both ``(B, P, C)``.
        images: ``(B, 3, height, width)``, preprocessed; the first ``IMAGES`` of them are used.
    """
    images = images[:IMAGES]
    watched = _Fixed(tuple(unit.path for unit in units), through=True)
    run(backbone, (watched,), torch.cat([images, images]), _Twins(share, fit))


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
    return features(backbone, run(backbone, policies, images, Compact())).float()
