"""Rotary embeddings: by what attention rotates queries and keys, wherever their tokens have come from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """How far each token's queries and keys are rotated: as its image patch, or the mean of its patches.

    A token that several patches have become part of is rotated by the mean of their sines and cosines: attention to it
    is then, to first order, attention to its patches. Prefix tokens are not rotated.

    Args:
        tables: the sines of the D channels of a head, then their cosines, for each of the P image patches,
            ``(T, P, G, 2 D)``. T is 1, or the number of blocks where each has its own; G is 1, or the number of heads.
        half: whether channel j is rotated with channel j + D / 2, instead of 2 j with 2 j + 1.
        owner: ``(B, P)``, as in ``Provenance``; None where each token is a patch.
        count: tokens behind the prefix; P without ``owner``.
        index: ``(M,)``, the tokens of the ragged layout as numbers in the flattened dense batch; None for all of them.
    """

    tables: Tensor
    half: bool
    owner: Tensor | None = None
    count: int = -1
    index: Tensor | None = None

    def following(self, owner: Tensor, count: int) -> Rotation:
        """That of the ``count`` tokens, behind the prefix, that the patches have become part of."""
        return replace(self, owner=owner, count=count)

    def taken(self, index: Tensor) -> Rotation:
        """That of the tokens at ``index`` of the flattened batch."""
        return replace(self, index=index)

    def rows(self, table: int, prefix: int) -> Tensor:
        """Sines and cosines of all tokens, ``(1 or B, N, G, 2 D)``, or of the ragged ones, ``(M, G, 2 D)``.

        Args:
            table: number of the attention that asks.
            prefix: leading tokens of every image, which are not rotated.
        """
        own = self.tables[table if len(self.tables) > 1 else 0]
        still = torch.zeros_like(own[0]).unflatten(-1, (2, -1))
        still = (still + still.new_tensor([0.0, 1.0])[:, None]).flatten(-2)  # (G, 2 D)
        rows = own[None] if self.owner is None else self._means(own, self.owner, still)
        rows = torch.cat([still.expand(rows.shape[0], prefix, -1, -1), rows], dim=1)
        if self.index is None:
            return rows
        return rows.flatten(0, 1).index_select(0, self.index % rows.shape[1] if len(rows) == 1 else self.index)

    def _means(self, own: Tensor, owner: Tensor, still: Tensor) -> Tensor:
        """Means over the patches of each token, ``(B, count, G, 2 D)``, at least in fp32."""
        images, patches = owner.shape
        flat = own.flatten(1).to(torch.promote_types(own.dtype, torch.float32))
        into = torch.where(owner < 0, self.count, owner)  # a token more, for patches that are dropped
        sums = flat.new_zeros(images, self.count + 1, flat.shape[1])
        sums = sums.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, flat.shape[1]), flat.expand(images, -1, -1))
        numbers = flat.new_zeros(images, self.count + 1).scatter_add(1, into, flat.new_ones(images, patches))
        sums, numbers = sums[:, :-1], numbers[:, :-1].unsqueeze(-1)
        return torch.where(numbers > 0, sums / numbers.clamp_min(1), still.flatten()).unflatten(-1, still.shape)

    def turn(self, x: Tensor, rows: Tensor) -> Tensor:
        """Queries or keys ``(..., H, D)`` rotated by ``rows``, in the wider of the two precisions."""
        sines, cosines = rows.chunk(2, dim=-1)
        if self.half:
            first, second = x.chunk(2, dim=-1)
            turned = torch.cat([-second, first], dim=-1)
        else:
            first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
            turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return (x * cosines + turned * sines).to(x.dtype)
