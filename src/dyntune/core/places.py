"""Where tokens lie: what a host knows of image patches, and of pairs of them, as that of the tokens that there are."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Places:
    """Which image patches each token lies at, in whichever layout; several have their mean.

    Args:
        owner: ``(B, P)``, as in ``Provenance``; None where each token is a patch.
        count: tokens behind the prefix; of no meaning without ``owner``.
        index: ``(M,)``, the tokens of the ragged layout as numbers in the flattened dense batch; None for all of them.
    """

    owner: Tensor | None = None
    count: int = 0
    index: Tensor | None = None

    def following(self, owner: Tensor, count: int) -> Places:
        """Those of the ``count`` tokens, behind the prefix, that the patches have become part of."""
        return replace(self, owner=owner, count=count)

    def taken(self, index: Tensor) -> Places:
        """Those of the tokens at ``index`` of the flattened batch."""
        return replace(self, index=index)

    def of_tokens(self, values: Tensor, own: int, prefix: int, absent: Tensor) -> Tensor:
        """Values of patches as those of the dense tokens, ``(1 or B, N, F)``; means of them are at least in fp32.

        Args:
            values: ``(1 or B, own + P, F)``, those of the host's own prefix tokens, then those of the patches.
            own: prefix tokens that ``values`` has.
            prefix: prefix tokens that there are; those behind the host's own lie nowhere.
            absent: ``(F,)``, of tokens that lie nowhere.
        """
        patches = values[:, own:] if self.owner is None else self._means(values[:, own:], self.owner, absent)
        images, pieces = patches.shape[0], [patches]
        # None of these is empty: at a constant without elements, OpenVINO's conversion stops the process.
        if prefix > own:
            pieces.insert(0, absent.to(patches.dtype).expand(images, prefix - own, -1))
        if own:
            pieces.insert(0, values[:, :own].to(patches.dtype).expand(images, -1, -1))
        return torch.cat(pieces, dim=1) if len(pieces) > 1 else patches

    def _means(self, values: Tensor, owner: Tensor, absent: Tensor) -> Tensor:
        images, width = owner.shape[0], values.shape[-1]
        values = values.to(torch.promote_types(values.dtype, torch.float32))
        into = torch.where(owner < 0, self.count, owner)  # a token more, for patches that are dropped
        sums = values.new_zeros(images, self.count + 1, width)
        sums = sums.scatter_add(1, into.unsqueeze(-1).expand(-1, -1, width), values.expand(images, -1, -1))
        numbers = values.new_zeros(images, self.count + 1).scatter_add(1, into, values.new_ones(owner.shape))
        sums, numbers = sums[:, :-1], numbers[:, :-1].unsqueeze(-1)
        return torch.where(numbers > 0, sums / numbers.clamp_min(1), absent.to(sums.dtype))

    def of_pairs(self, bias: Tensor, own: int, prefix: int) -> Tensor:
        """A bias of pairs of patches as that of pairs of dense tokens, ``(1 or B, H, N, N)``; 0 for what lies nowhere.

        Args:
            bias: ``(H, own + P, own + P)``, from the queries' places to the keys'.
            own, prefix: as in ``of_tokens``.
        """
        if self.owner is None:
            inserted = prefix - own
            if not inserted:
                return bias[None]
            bias = torch.cat([bias[:, :own], F.pad(bias[:, own:], (0, 0, inserted, 0))], dim=1)
            return torch.cat([bias[..., :own], F.pad(bias[..., own:], (inserted, 0))], dim=2)[None]
        heads, places, _ = bias.shape
        rows = bias.transpose(0, 1).flatten(1)[None]
        rows = self.of_tokens(rows, own, prefix, rows.new_zeros(rows.shape[-1])).unflatten(-1, (heads, places))
        columns = rows.permute(0, 3, 1, 2).flatten(2)  # (B, own + P, N H)
        pairs = self.of_tokens(columns, own, prefix, columns.new_zeros(columns.shape[-1])).unflatten(-1, (-1, heads))
        return pairs.permute(0, 3, 2, 1)


EVERY_PLACE = Places()
"""Every token lies at its patch."""
