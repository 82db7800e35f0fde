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
        prefix: leading tokens of every image (class, register, prompts) that are no image patches. They are always
            computed.
        grid: rows and columns of patches in the image.
        keys: ``(B, N)`` with 1 for the tokens that may be attended to, 0 for the others; None means all.
        counts: tokens of each image in the ragged layout; None where nothing asks which token is whose.
        prompts: how many of the prefix tokens, the last ones, a method has inserted.
        normed: what the next unit's norm makes of ``x``, of its shape, where that is known already.
    """

    x: Tensor
    prefix: int
    grid: tuple[int, int]
    keys: Tensor | None = None
    counts: tuple[int, ...] | None = None
    prompts: int = 0
    normed: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """The features without prefix tokens, ``(B, P, C)``; dense layout only."""
        return self.x[:, self.prefix :]

    def with_x(self, x: Tensor) -> Tokens:
        """The same tokens with other features of the same layout."""
        return replace(self, x=x, normed=None)

    def with_normed(self, normed: Tensor) -> Tokens:
        """The same tokens together with what the next unit's norm makes of them."""
        return replace(self, normed=normed)

    def with_prompts(self, prompts: Tensor) -> Tokens:
        """The same tokens with ``prompts``, ``(B, p, C)``, in place of those inserted before; dense layout only."""
        own = self.prefix - self.prompts
        x = torch.cat([self.x[:, :own], prompts.to(self.x.dtype), self.patches], dim=1)
        return replace(self, x=x, prefix=own + prompts.shape[1], prompts=prompts.shape[1], normed=None)

    def without_prompts(self) -> Tokens:
        """The same tokens less the inserted prompts; dense layout only."""
        return self.with_prompts(self.x[:, :0]) if self.prompts else self

    def take(self, index: Tensor, counts: tuple[int, ...] | None) -> Tokens:
        """The tokens at ``index`` of the flattened batch, in the ragged layout: ``counts`` of them from each image."""
        normed = None if self.normed is None else self.normed.flatten(0, 1).index_select(0, index)
        x = self.x.flatten(0, 1).index_select(0, index)
        return Tokens(x, self.prefix, self.grid, counts=counts, prompts=self.prompts, normed=normed)

    def with_keys(self, keys: Tensor) -> Tokens:
        """The same tokens, of which only those with ``keys`` 1, ``(B, N)``, may be attended to."""
        return replace(self, keys=keys)

    def cover_prefix(self, gate: Tensor) -> Tensor:
        """Extends a gate over patches, ``(B, P)``, to all tokens, ``(B, N)``: prefix tokens are always active."""
        return torch.cat([gate.new_ones(gate.shape[0], self.prefix), gate], dim=1)
