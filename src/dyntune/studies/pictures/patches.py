"""What has become of each image patch at one unit: whose token it is part of, and whether that token was computed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dyntune.core.errors import DyntuneError
from dyntune.core.tokens import Provenance
from dyntune.parts.policies.base import Gate

KINDS = {"attn": "attention", "mlp": "MLP", "layer": "whole block"}
"""Kinds of units and how pictures name them, in the order in which a block computes them."""
_PATH = re.compile(r"(?:^|\.)blocks\.(\d+)(?:\.(attn|mlp))?$")


@dataclass(frozen=True)
class PatchState:
    """The patches of one image at one unit; all arrays are ``(rows, columns)``.

    Args:
        owner: number of the token that each patch is part of; -1 where it was dropped.
        active: Boolean, the patches whose token the unit computed.
    """

    owner: np.ndarray
    active: np.ndarray

    @property
    def dropped(self) -> np.ndarray:
        """Boolean, the patches that are part of no token."""
        return self.owner < 0

    @property
    def skipped(self) -> np.ndarray:
        """Boolean, the patches whose token is there, but was not computed."""
        return ~self.dropped & ~self.active

    @cached_property
    def merged(self) -> np.ndarray:
        """Boolean, the patches that share their token with others."""
        _, place, sizes = np.unique(self.owner, return_inverse=True, return_counts=True)
        return ~self.dropped & (sizes[place].reshape(self.owner.shape) > 1)

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return len(np.unique(self.owner[~self.dropped]))

    @property
    def share(self) -> float:
        """Share of the tokens that the unit computed."""
        return len(np.unique(self.owner[~self.dropped & self.active])) / max(1, self.tokens)


def gated_blocks(gates: Sequence[Gate], asked: Sequence[int] | None = None) -> list[int]:
    """Numbers of the blocks with gates, or of those among them that are asked for.

    Raises:
        DyntuneError: there are no gates, or none in a block that is asked for.
    """
    if not gates:
        raise DyntuneError("the model gates no unit, so no patches are skipped; tune it with dyt or dispatch.")
    known = sorted({split_path(gate.unit)[0] for gate in gates})
    without = sorted(set(asked or ()) - set(known))
    if without:
        raise DyntuneError(
            f"no unit is gated in the blocks {', '.join(map(str, without))}; those with gates are "
            f"{', '.join(map(str, known))}."
        )
    return known if asked is None else sorted(set(asked))


def blocks_in_words(shown: Sequence[int], gates: Sequence[Gate]) -> str:
    """Which of the gated blocks are drawn, ``blocks 1, 4, 7, 10 of 12 with gates``; nothing where all are."""
    known = gated_blocks(gates)
    if len(shown) == len(known):
        return ""
    noun = "block" if len(shown) == 1 else "blocks"
    return f"{noun} {', '.join(map(str, shown))} of {len(known)} with gates"


def states_at_gate(gate: Gate, images: int, grid: tuple[int, int]) -> list[PatchState]:
    """The state of each image's patches at a gated unit.

    Raises:
        ValueError: the gate is not one of that many images and patches.
    """
    what = f"the gate of {gate.unit}"
    owner = _owner(gate.provenance, gate.values, what, images, grid)
    active = _of_grid(gate.on_patches.detach().float() > 0.5, what, images, grid)
    return [PatchState(*state) for state in zip(owner, active & (owner >= 0), strict=True)]


def states_after(provenance: Provenance, unit: str, images: int, grid: tuple[int, int]) -> list[PatchState]:
    """The state of each image's patches behind the reduction at ``unit``; every token counts as active.

    Raises:
        ValueError: the reduction is not one of that many images and patches.
    """
    tokens = provenance.present if provenance.owner is None else provenance.owner
    assert tokens is not None  # a reduction has changed something
    owner = _owner(provenance, tokens, f"the reduction at {unit}", images, grid)
    return [PatchState(numbers, np.ones(grid, dtype=bool)) for numbers in owner]


def mean_colours(pixels: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """The mean colour, between 0 and 1, of the token that each patch is part of: ``(rows, columns, 3)``.

    Args:
        pixels: the mean colour of each patch, ``(rows, columns, 3)``, between 0 and 255.
        owner: ``(rows, columns)``.
    """
    _, place, sizes = np.unique(owner, return_inverse=True, return_counts=True)
    place = place.ravel()
    sums = [np.bincount(place, channel.ravel()) for channel in np.moveaxis(pixels / 255, -1, 0)]
    return (np.stack(sums, axis=-1) / sizes[:, None])[place].reshape(*owner.shape, 3)


def _owner(provenance: Provenance, tokens: Tensor, what: str, images: int, grid: tuple[int, int]) -> np.ndarray:
    """``(B, rows, columns)``, with -1 also for tokens that training hides; ``tokens`` has a column per token."""
    owner = provenance.of_patches(torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1), -1)
    if provenance.present is not None:
        owner = owner.where(provenance.of_patches(provenance.present) > 0.5, -1)
    return _of_grid(owner, what, images, grid)


def _of_grid(values: Tensor, what: str, images: int, grid: Sequence[int]) -> np.ndarray:
    """Checked, on the CPU and in the shape of the grid."""
    expected = (images, grid[0] * grid[1])
    if tuple(values.shape) != expected:
        raise ValueError(f"{what} has shape {tuple(values.shape)}: expected (images, patches) = {expected}.")
    return values.cpu().numpy().reshape(images, *grid)


def split_path(path: str) -> tuple[int, str]:
    """``blocks.3.mlp`` to ``(3, "mlp")``, ``blocks.3`` to ``(3, "layer")``.

    Raises:
        ValueError: the path is not that of a block or of a block's sub-layer.
    """
    match = _PATH.search(path)
    if match is None:
        raise ValueError(f"{path!r} is no unit's path: expected blocks.3, blocks.3.attn or blocks.3.mlp.")
    return int(match[1]), match[2] or "layer"
