"""FPET: one differentiable merge that halves the patches in the middle of the network."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from statistics import NormalDist
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError
from dyntune.core.precision import full_precision
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy

_FEWEST = 4
"""Patches of an image, so that each has two others to be merged into."""
_ROUNDS = 200
"""Until the levels of a quantiser no longer move."""


class LowBitLinear(nn.Linear):
    """A linear map without bias whose weight takes ``2^bits`` values only.

    The weight is standardised as a whole, each value replaced by the nearest level, and the result brought back to its
    mean and deviation. The gradient passes the replacement as if it were not there.

    Args:
        inputs: channels in.
        outputs: channels out.
        bits: of a weight.
    """

    def __init__(self, inputs: int, outputs: int, bits: int) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.levels = quantiser_levels(bits)

    def quantised(self) -> Tensor:
        """The weight that is used, of the shape of ``weight``."""
        mean, deviation = self.weight.mean(), self.weight.std()
        standard = (self.weight - mean) / (deviation + 1e-5)
        nearest = torch.zeros_like(standard)
        for below, above in pairwise(self.levels):  # the levels' sum is 0
            nearest = nearest + torch.sign(standard.detach() - (below + above) / 2) * ((above - below) / 2)
        return (nearest + (standard - standard.detach())) * deviation + mean

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.quantised())


class Refinement(nn.Module):
    """What is added to the keys before they are matched: ``up(dropout(relu(down(k))))``.

    Args:
        width: channels of a key.
        hidden: channels in between.
        bits: of a weight.
        dropout: probability of dropping a hidden value while training.
    """

    def __init__(self, width: int, hidden: int, bits: int, dropout: float) -> None:
        super().__init__()
        self.down = LowBitLinear(width, hidden, bits)
        self.dropout = nn.Dropout(dropout)
        self.up = LowBitLinear(hidden, width, bits)
        nn.init.trunc_normal_(self.up.weight, std=0.001, a=-0.002, b=0.002)

    def forward(self, keys: Tensor) -> Tensor:
        return self.up(self.dropout(F.relu(self.down(keys))))


class Halving(Reducer):
    """Merges the patches on one colour of a checkerboard into those on the other.

    Args:
        refinement: of the keys.
        path: of the unit that it stands in front of, for messages.
    """

    def __init__(self, refinement: Refinement, path: str) -> None:
        super().__init__()
        self.refinement = refinement
        self.path = path

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        assert projected is not None  # installed in front of an MLP
        device = tokens.x.device
        first, others = checkerboard(*tokens.grid, device)
        if len(first) + len(others) < _FEWEST:
            raise BackboneError(
                f"fpet merges each patch into the better of at least two others, but in front of {self.path} there are "
                f"{tokens.grid[0]} x {tokens.grid[1]} patches. Give images of at least {_FEWEST} patches."
            )
        keys = projected.unrotated[:, tokens.prefix :].detach().mean(2)
        keys = (keys + self.refinement(keys)).float()
        with full_precision(device):
            keys = keys / keys.norm(dim=-1, keepdim=True)
            scores = keys.index_select(1, first) @ keys.index_select(1, others).mT  # (B, |A|, |B|)
        best, partners = scores.topk(2, dim=-1)
        soft = torch.sigmoid(scores - best.mean(-1, keepdim=True))
        hard = (soft > 0.5).to(soft.dtype)
        partner = partners[..., :1]
        found = hard.gather(-1, partner)  # 0 where the two best tie
        # In this order the forward value is exactly 0 or 1.
        links = hard + (soft - soft.detach()) if self.training else None

        def total(values: Tensor) -> Tensor:
            staying, going = values.index_select(1, others), values.index_select(1, first)
            if links is None:
                return staying.scatter_add(1, partner.expand_as(going), going * found.to(going.dtype))
            with full_precision(device):
                return staying + links.to(going.dtype).mT @ going

        number = torch.arange(len(others), device=device).expand(scores.shape[0], -1)
        into = torch.cat([partner.masked_fill(found == 0, -1).squeeze(-1), number], dim=1)
        moved = into.index_select(1, torch.cat([first, others]).argsort())
        sizes = total(torch.ones_like(keys[..., :1]))

        def merge(tokens: Tokens) -> Tokens:
            merged = total(tokens.patches) / sizes
            counts = sizes.squeeze(-1)
            return tokens.with_patches(merged, moved, sizes=counts, key_bias=counts.log())

        return merge


@dataclass(frozen=True)
class Fpet(ReducingPolicy):
    """Halves the patches once, in the middle of the network, by a merge that learns which patches belong together.

    Between attention and MLP of one block, the patches with an even sum of row and column, A, are merged into the
    others, B, in which they resemble one most. Keys k of the block's attention (their mean over heads, without gradient
    to them) are refined to ``k + up(relu(down(k)))``, with two matrices of low-bit weights; S are their cosines:

        ``M = sigmoid(S - t)``, rounded to 0 or 1, with t the mean of the two best in each row of A;
        ``x_B := (x_B + M^T x_A) / (1 + M^T 1)``

    The rounding lets the gradient through, so the refinement learns from the task's loss. A patch of A whose two best
    scores tie has no partner, and vanishes. Merged patches count by their number in later attention and in means.
    Prefix tokens are left alone. Grids of any shape are split, if they have four patches or more; the keys of images
    of P patches cost ``2 P d h`` MACs and the matching about ``P^2 d / 4``, for heads of width d. ``2 d h`` parameters.

    Args:
        block: number of the block in which patches are merged, from 0; none for the middle (6 of 12), as published.
        hidden: width h between the two matrices.
        bits: of each weight of the two, which are trained and saved in full precision.
        dropout: probability of dropping a hidden value while training.
    """

    source: ClassVar[str] = "Kim et al., CVPR 2025, arXiv 2503.20282"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.refinement\.adapter_(down|up)\.": r"blocks.\1.mlp.reducers.fpet.refinement.\2."
    }

    block: int | None = None
    hidden: int = 32
    bits: Literal[1, 2] = 1
    dropout: float = 0.1

    def check(self) -> None:
        self.require(self.block is None or self.block >= 0, "block of at least 0")
        self.require(self.hidden >= 1, "hidden of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        depth = len(backbone.blocks)
        index = depth // 2 if self.block is None else self.block
        self.require(index < depth, f"block below {depth}, the number of blocks")
        self.require(prod(backbone.grid) >= _FEWEST, f"a backbone with at least {_FEWEST} patches for each image")
        block = backbone.blocks[index]
        refinement = Refinement(block.attn.head_width, self.hidden, self.bits, self.dropout)
        block.mlp.add_reducer(self.name(), Halving(refinement, block.mlp.path))


def checkerboard(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Numbers of the patches in A, those of even rows first, and of those in B, those of odd rows first."""
    number = torch.arange(rows * columns, device=device).view(rows, columns)
    first = torch.cat([number[::2, ::2].flatten(), number[1::2, 1::2].flatten()])
    return first, torch.cat([number[1::2, ::2].flatten(), number[::2, 1::2].flatten()])


def quantiser_levels(bits: int) -> list[float]:
    """The ``2^bits`` levels for values with a standard normal distribution.

    Each is the median of the values between the midpoints to its neighbours.
    """
    normal = NormalDist()
    levels = [0.0] * 2**bits
    for _ in range(_ROUNDS):
        shares = [0.0, *(normal.cdf((below + above) / 2) for below, above in pairwise(levels)), 1.0]
        levels = [normal.inv_cdf((below + above) / 2) for below, above in pairwise(shares)]
    return levels
