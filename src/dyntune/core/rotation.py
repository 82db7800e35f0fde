"""Rotary embeddings: by what attention rotates queries and keys, wherever their tokens have come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dyntune.core.places import Places


@dataclass(frozen=True)
class Rotation:
    """How far queries and keys are rotated at each patch.

    A token that several patches have become part of is rotated by the mean of their sines and cosines: attention to it
    is then, to first order, attention to its patches. Prefix tokens are not rotated.

    Args:
        tables: the sines of the D channels of a head, then their cosines, for each of the P image patches,
            ``(T, P, G, 2 D)``. T is 1, or the number of blocks where each has its own; G is 1, or the number of heads.
        half: whether channel j is rotated with channel j + D / 2, instead of 2 j with 2 j + 1.
    """

    tables: Tensor
    half: bool

    def rows(self, table: int, places: Places, prefix: int) -> Tensor:
        """Sines and cosines of all tokens, ``(1 or B, N, G, 2 D)``, or of the ragged ones, ``(M, G, 2 D)``.

        Args:
            table: number of the attention that asks.
            places: of the tokens.
            prefix: leading tokens of every image, which are not rotated.
        """
        own = self.tables[table if len(self.tables) > 1 else 0]
        # No rotation: sines of 0 and cosines of 1, made on the device itself, which a captured pass must not wait for.
        sines = torch.zeros_like(own[0]).chunk(2, dim=-1)[0]
        still = torch.cat([sines, torch.ones_like(sines)], dim=-1)  # (G, 2 D)
        rows = places.of_tokens(own.flatten(1)[None], 0, prefix, still.flatten()).unflatten(-1, still.shape)
        if places.index is None:
            return rows
        index = places.index % rows.shape[1] if places.owner is None else places.index
        return rows.flatten(0, 1).index_select(0, index)

    def turn(self, x: Tensor, rows: Tensor) -> Tensor:
        """Queries or keys ``(..., H, D)`` rotated by ``rows``, in the wider of the two precisions."""
        width = x.shape[-1]
        # Halves by themselves: one tensor of all turned channels would be written once more, and negated.
        halves = (self._pair(t) for t in (x, rows[..., :width], rows[..., width:]))
        (first, second), (sine, other_sine), (cosine, other_cosine) = halves
        turned = first * cosine - second * sine, second * other_cosine + first * other_sine
        joined = torch.cat(turned, dim=-1) if self.half else torch.stack(turned, dim=-1).flatten(-2)
        return joined.to(x.dtype)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The channels that come first in their pairs, and those that they are rotated with."""
        first, second = x.chunk(2, dim=-1) if self.half else x.unflatten(-1, (-1, 2)).unbind(-1)
        return first, second
