"""ToMe: in every block the r most similar pairs of patches are merged, between attention and MLP."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch

from dyntune.backbones.base import Backbone
from dyntune.core.matching import bipartite_matching, weighted_mean
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy


class Merging(Reducer):
    """Merges the ``merges`` most similar pairs, by the cosine of the block's keys, averaged over its heads.

    Args:
        merges: pairs to merge.
        proportional: whether a merged token counts in attention for as many keys as it has patches.
    """

    def __init__(self, merges: int, proportional: bool) -> None:
        super().__init__()
        self.merges = merges
        self.proportional = proportional

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        assert projected is not None  # installed in front of an MLP
        keys = projected.unrotated[:, tokens.prefix :].detach().mean(2)
        matching = bipartite_matching(keys, tokens.prefix, self.merges)
        if matching is None:
            return None
        sizes = tokens.provenance.sizes
        if sizes is None:
            # In bf16, which keys may have, counts above 256 are not exact.
            sizes = torch.ones_like(keys[..., 0], dtype=torch.float32)

        def merge(tokens: Tokens) -> Tokens:
            patches, merged = weighted_mean(matching, tokens.patches, sizes)
            bias = merged.log() if self.proportional else None
            return tokens.with_patches(patches, matching.moved, sizes=merged, key_bias=bias)

        return merge


@dataclass(frozen=True)
class ToMe(ReducingPolicy):
    """Token merging: between attention and MLP, the r most similar pairs of patches become one token each.

    Patches are split by even and odd position; each even one is matched with the odd one whose key (the mean over
    heads) has the highest cosine with its own, and the r best matches are merged into their size-weighted mean. At most
    half of the patches are merged in a block. Prefix tokens (class, distillation, register, prompts) are never merged.
    Nothing is trained, and it works without training too; training and evaluation compute the same. Matching P patches
    costs ``floor(P / 2) ceil(P / 2) d`` MACs, d the width of a head.

    In a mean over tokens and in attention pooling a token counts for its patches.

    Args:
        r: pairs merged in each block, or a list with a number per block (missing ones are 0).
        inflect: how r changes from the first block to the last, between -1 (from 2 r down to 0) and 1 (from 0 up to 2
            r); 0 for the same in every block.
        proportional: whether a merged token counts in attention for as many keys as it has patches.
    """

    source: ClassVar[str] = "Bolya et al., ICLR 2023, arXiv 2210.09461"

    r: int | tuple[int, ...] = 8
    inflect: float = 0.0
    proportional: bool = True

    def check(self) -> None:
        self.require(min(self.r if isinstance(self.r, tuple) else (self.r,), default=0) >= 0, "r of at least 0")
        self.require(-1 <= self.inflect <= 1, "inflect between -1 and 1")
        self.require(not isinstance(self.r, tuple) or not self.inflect, "inflect only with a single r, not with a list")

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Pairs to merge in each of ``depth`` blocks.

        Raises:
            SpecError: the list r is longer than that.
        """
        if isinstance(self.r, tuple):
            self.require(len(self.r) <= depth, f"at most {depth} numbers in r, one per block")
            return self.r + (0,) * (depth - len(self.r))
        lowest = int(self.r * (1 - self.inflect))
        step = (2 * (self.r - lowest)) / max(1, depth - 1)
        return tuple(int(lowest + step * block) for block in range(depth))

    def install(self, backbone: Backbone) -> None:
        for block, merges in zip(backbone.blocks, self.schedule(len(backbone.blocks)), strict=True):
            if merges:
                block.mlp.add_reducer(self.name(), Merging(merges, self.proportional))
