"""PYRA: token merging in which learned weights modulate the patches that are merged away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.core.matching import bipartite_matching, taken
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy

_SCHEDULES: dict[str, tuple[tuple[int, ...], ...]] = {
    "low": ((*[16] * 11, 10), (*[8] * 23, 6)),
    "high": (
        (40, 34, 30, 24, 18, 14, 10, 8, 4, 4, 3, 3),
        (20, 19, 18, 17, 15, 13, 13, 12, 10, 9, 8, 6, 6, 4, 4, 4, 3, 3, 2, 2, 1, 1, 1, 1),
    ),
}
"""Pairs merged in each block of ViT-B and of ViT-L, as published."""
_GRID = (14, 14)
"""Patches of the models that the schedules were published for."""


class Modulation(Reducer):
    """Merges the most similar pairs, by the cosine of the block's keys, and modulates what is merged away.

    Args:
        merges: pairs to merge.
        width: channels of a token.
        path: of the unit that it stands in front of, for messages.
    """

    def __init__(self, merges: int, width: int, path: str) -> None:
        super().__init__()
        self.path = path
        self.a = nn.Parameter(torch.empty(merges, 1).uniform_(-1, 1))
        self.b = nn.Parameter(torch.zeros(1, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        assert projected is not None  # installed in front of an MLP
        keys = projected.unrotated[:, tokens.prefix :].detach().mean(2)
        matching = bipartite_matching(keys, tokens.prefix, len(self.a))
        merged = 0 if matching is None else matching.src.shape[1]
        if matching is None or merged < len(self.a):
            raise BackboneError(
                f"pyra has learned to merge {len(self.a)} pairs in front of {self.path}, but of the {keys.shape[1]} "
                f"patches there only {merged} can be merged. Give images of at least the size that the model was tuned "
                "for, or tune one for this size."
            )
        sizes = tokens.provenance.sizes
        if sizes is None:
            sizes = torch.ones(keys.shape[:2], device=keys.device)
        sizes = sizes.unsqueeze(-1)
        totals = matching.sum(sizes)
        # Decided here, on the tokens themselves: what stands beside the block is merged with the same factors.
        factors = self.factors(*matching.pairs((tokens.patches * sizes).to(tokens.x.dtype)))

        def merge(tokens: Tokens) -> Tokens:
            weighted = tokens.patches * sizes
            patches = matching.sum(weighted, taken(weighted, matching.src) * factors) / totals
            counts = totals.squeeze(-1)
            return tokens.with_patches(patches, matching.moved, sizes=counts, key_bias=counts.log())

        return merge

    def factors(self, src: Tensor, dst: Tensor) -> Tensor:
        """What each value of a source is multiplied by, ``(B, r, C)``, from sources and destinations of this shape."""
        pairs = self.norm(src + dst)
        by_channel = 2 * torch.sigmoid(self.a.mT @ pairs)
        by_pair = 2 * torch.sigmoid(pairs @ self.b.mT) - 1
        return 1 + by_channel * by_pair


@dataclass(frozen=True)
class Pyra(ReducingPolicy):
    """Token merging in which what is merged away is first rescaled, by channel and by pair, with learned weights.

    Patches are matched and merged as by ``tome``, with proportional attention: sources S and their destinations T, r of
    each and weighted by their sizes, the most similar pair first. What is added to T is not S but

        ``S + S * w1 * w2``, with ``Q = LayerNorm(S + T)``, ``w1 = 2 sigmoid(a^T Q)``, ``w2 = 2 sigmoid(Q b^T) - 1``

    where w1 has one value per channel and w2 one per pair. It starts with ``b = 0``, at which it is ``tome``. A block
    has ``3 D + r`` parameters and, besides the matching, ``7 r D`` MACs. The rows of a belong to the r pairs, so r is
    fixed when the model is tuned, for the image size that its backbone was built for: at most half of the patches of a
    block are merged. Images in which fewer would be merged are refused. Where the head reads the class token alone, the
    last block's parameters change nothing and do not learn; they are there as in the published models.

    Args:
        r: pairs merged in each block: low or high, the published schedules, or one number for every block, or a list of
            at least two (missing ones are 0). The published ones are for 12 blocks (ViT-B) or 24 (ViT-L) and 14 x 14
            patches. For other backbones the nearer depth's is scaled: the share of the patches that is gone is
            interpolated between blocks. For low on a distilled DeiT-B, 16/16/16/16/16/16/10/10/10/10/10/10 was
            published.
    """

    source: ClassVar[str] = "Xiong et al., ECCV 2024, arXiv 2403.09192"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.pyra_(a|b)$": r"blocks.\1.mlp.reducers.pyra.\2",
        r"^blocks\.(\d+)\.pyra_norm\.": r"blocks.\1.mlp.reducers.pyra.norm.",
    }

    r: Literal["low", "high"] | int | tuple[int, ...] = "low"

    def check(self) -> None:
        numbers = self.r if isinstance(self.r, tuple) else (self.r,)
        self.require(all(isinstance(number, str) or number >= 0 for number in numbers), "r of at least 0")
        # One number is written like the same for every block.

    def schedule(self, depth: int, patches: int) -> tuple[int, ...]:
        """Pairs to merge in each of ``depth`` blocks of a backbone with ``patches`` patches.

        Raises:
            SpecError: the list r is longer than that.
        """
        if isinstance(self.r, str):
            wished: Sequence[int] = _scaled(self.r, depth, patches)
        elif isinstance(self.r, int):
            wished = (self.r,) * depth
        else:
            self.require(len(self.r) <= depth, f"at most {depth} numbers in r, one per block")
            wished = self.r + (0,) * (depth - len(self.r))
        merges = []
        for number in wished:
            merges.append(min(number, patches // 2))
            patches -= merges[-1]
        return tuple(merges)

    def install(self, backbone: Backbone) -> None:
        schedule = self.schedule(len(backbone.blocks), prod(backbone.grid))
        for block, merges in zip(backbone.blocks, schedule, strict=True):
            if merges:
                block.mlp.add_reducer(self.name(), Modulation(merges, block.width, block.mlp.path))


def _scaled(name: str, depth: int, patches: int) -> tuple[int, ...]:
    """A published schedule for another depth and number of patches."""
    published = min(_SCHEDULES[name], key=lambda numbers: abs(len(numbers) - depth))
    gone = [0, *accumulate(published)]
    totals = []
    for block in range(depth + 1):
        whole, rest = divmod(block * len(published), depth)
        step = rest / depth * published[whole] if rest else 0
        totals.append(round((gone[whole] + step) * patches / prod(_GRID)))
    return tuple(after - before for before, after in pairwise(totals))
