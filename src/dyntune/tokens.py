"""The tokens on their way through a model: features plus what must be known about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Token features and their layout; immutable, local to one forward pass.

    Two layouts exist. *Dense*: ``x`` is ``(B, N, C)``. *Ragged*: ``x`` is ``(M, C)``, the tokens of all images one
    after the other, ``counts[b]`` of them from image ``b``.

    Args:
        x: features, ``(B, N, C)`` or ``(M, C)``.
        prefix: leading tokens of every image (class, register) that are no image patches. They are always computed.
        grid: rows and columns of patches in the image.
        keys: ``(B, N)`` with 1 for the tokens that may be attended to, 0 for the others; None means all.
        counts: tokens of each image in the ragged layout; None where nothing asks which token is whose.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int]
    keys: Tensor | None = None
    counts: tuple[int, ...] | None = None

    @property
    def patches(self) -> Tensor:
        """The features without prefix tokens, ``(B, P, C)``; dense layout only."""
        return self.x[:, self.prefix :]

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other features of the same layout."""
        return replace(self, x=x)

    def with_keys(self, keys: Tensor) -> Tokens:
        """The same tokens, of which only those with ``keys`` 1, ``(B, N)``, may be attended to."""
        return replace(self, keys=keys)

    def cover_prefix(self, gate: Tensor) -> Tensor:
        """Extends a gate over patches, ``(B, P)``, to all tokens, ``(B, N)``: prefix tokens are always active."""
        return torch.cat([gate.new_ones(gate.shape[0], self.prefix), gate], dim=1)
