"""Bipartite soft matching: which patches are merged into which others (ToMe, section 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Which of the P patches of each image are merged into which others.

    Every source is merged into one patch of a set B, its destination; several may share one. Of the merged tokens, the
    patches that stay as they are come first, then those of B.

    Args:
        kept: ``(B, K)``, numbers of the patches outside B that stay, in their new order.
        others: ``(S,)``, numbers of the patches of B.
        src: ``(B, r)``, the sources: numbers of the patches that are merged, those of the most similar pairs first.
        dst: ``(B, r)``, the destinations: into which patch of B each source goes, numbered within B.
    """

    kept: Tensor
    others: Tensor
    src: Tensor
    dst: Tensor

    def sum(self, values: Tensor, src: Tensor | None = None) -> Tensor:
        """Values ``(B, P, C)`` of the patches to their sums over each merged token, ``(B, P - r, C)``.

        Args:
            values: of all patches.
            src: ``(B, r, C)``, what the sources add instead of their own values.
        """
        added = taken(values, self.src) if src is None else src
        index = self.dst.unsqueeze(-1).expand_as(added)
        merged = values.index_select(1, self.others).scatter_add(1, index, added)
        return torch.cat([taken(values, self.kept), merged], dim=1)

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values ``(B, P, C)`` of the patches to those of sources and destinations, each ``(B, r, C)``."""
        return taken(values, self.src), taken(values.index_select(1, self.others), self.dst)

    @property
    def moved(self) -> Tensor:
        """``(B, P)``, for each patch the number of the merged token that it has become part of."""
        kept = self.kept.shape[1]
        order = torch.cat([self.kept, self.others.expand(self.kept.shape[0], -1), self.src], dim=1)
        count = kept + len(self.others)
        stay = torch.arange(count, device=order.device).expand(order.shape[0], -1)
        return torch.zeros_like(order).scatter(1, order, torch.cat([stay, kept + self.dst], dim=1))


@torch.no_grad()
def bipartite_matching(metric: Tensor, prefix: int, merges: int) -> Matching | None:
    """Matches each patch of a set A with the most similar one of a set B, and merges the most similar pairs.

    A holds the patches at even positions of the image's tokens, prefix included, B the others. Prefix tokens are
    neither sources nor destinations. Patches of A that stay keep their order, except without any prefix token, where
    they are sorted by falling similarity, as in the public code.

    Args:
        metric: ``(B, P, d)``, what similarity is measured on, by its cosine.
        prefix: tokens before the patches.
        merges: patches to merge away; at most half of them can be.

    Returns:
        None if nothing is merged.
    """
    count = metric.shape[1]
    merges = min(merges, count // 2)
    if merges <= 0:
        return None
    metric = metric / metric.norm(dim=-1, keepdim=True)
    number = torch.arange(count, device=metric.device)
    first, others = number[prefix % 2 :: 2], number[1 - prefix % 2 :: 2]
    scores = metric.index_select(1, first) @ metric.index_select(1, others).mT  # (B, |A|, |B|)
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    src, kept = order[:, :merges], order[:, merges:]
    if prefix:
        kept = kept.sort(dim=-1).values
    return Matching(first[kept], others, first[src], partner.gather(1, src))


def weighted_mean(matching: Matching, values: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The size-weighted mean of each merged token, ``(B, P - r, C)``, and its size, ``(B, P - r)``.

    Args:
        matching: what is merged.
        values: ``(B, P, C)``.
        sizes: ``(B, P)``.
    """
    merged = matching.sum(sizes.unsqueeze(-1))
    return matching.sum(values * sizes.unsqueeze(-1)) / merged, merged.squeeze(-1)


def taken(values: Tensor, index: Tensor) -> Tensor:
    """Values ``(B, P, C)`` of the patches at ``index``, ``(B, K)``: ``(B, K, C)``."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))
