"""FacT-TK: one Tucker decomposition of the changes of all weights of the blocks."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.sites import Change, Site, SiteKind
from dyntune.parts.methods.base import TuningMethod

Order = Literal["interleaved", "contiguous"]


class Factors(nn.Module):
    """U (r x D), V (D x r), the core C (r x r x r) and P (r x slots), which all places share; V is zero at the start.

    Column k of P makes from C the r x r matrix ``F_k = C P_k`` of slot k, from the output of U to the input of V.
    """

    def __init__(self, width: int, rank: int, slots: int) -> None:
        super().__init__()
        self.u = nn.Linear(width, rank, bias=False)
        self.v = nn.Linear(rank, width, bias=False)
        self.c = nn.Parameter(torch.empty(rank, rank, rank))
        self.p = nn.Parameter(torch.empty(rank, slots))
        nn.init.zeros_(self.v.weight)
        nn.init.xavier_uniform_(self.c)
        nn.init.xavier_uniform_(self.p)

    def slots(self, first: int, count: int) -> Tensor:
        """F of ``count`` slots from number ``first`` on, ``(r, r, count)``."""
        return self.c @ self.p[:, first : first + count]


class Tucker(Change):
    """Adds ``s * V drop(G^T U x)`` to the output, where U and V act on each D channels of the input and output.

    Args:
        factors: U, V, C and P.
        kind: the site's kind; qkv has a matrix G for each of its slots, the others have one made of all.
        first: number of the site's first slot.
        inputs: chunks of D channels that the site reads.
        outputs: chunks of D channels that the site gives.
        scale: the factor s.
        dropout: probability of dropping a hidden value in front of V while training.
        order: how the matrices F of the MLP's slots make one G.
    """

    factors: Factors

    def __init__(
        self,
        factors: Factors,
        kind: SiteKind,
        first: int,
        inputs: int,
        outputs: int,
        scale: float,
        dropout: float,
        order: Order,
    ) -> None:
        super().__init__()
        # Not registered: the backbone owns them, and they must not appear once more at each place.
        object.__setattr__(self, "factors", factors)
        self.kind = kind
        self.first = first
        self.inputs = inputs
        self.outputs = outputs
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.order = order

    def matrices(self) -> tuple[Tensor, ...]:
        """The matrices G, ``(chunks read * r, chunks given * r)``, whose outputs stand one after the other."""
        f = self.factors.slots(self.first, self.inputs * self.outputs)
        if self.kind not in ("fc1", "fc2"):
            return f.unbind(-1)
        if self.order == "interleaved":
            return (f.flatten(1) if self.kind == "fc1" else f.flatten(1).T,)
        return (f.transpose(1, 2).flatten(1) if self.kind == "fc1" else f.permute(2, 0, 1).flatten(0, 1),)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * torch.cat([self._update(x, matrix) for matrix in self.matrices()], dim=-1)

    def _update(self, x: Tensor, matrix: Tensor) -> Tensor:
        factors = self.factors
        hidden = self.dropout(factors.u(x.unflatten(-1, (self.inputs, -1))).flatten(-2) @ matrix)
        return factors.v(hidden.unflatten(-1, (-1, factors.v.in_features))).flatten(-2)

    @torch.no_grad()
    def fold(self, site: Site) -> None:
        u, v = self.factors.u.weight, self.factors.v.weight
        rank = len(u)
        changes = []
        for matrix in self.matrices():
            g = matrix.unflatten(1, (-1, rank)).unflatten(0, (-1, rank))
            changes.append(torch.einsum("op,aqbp,qi->boai", v, g, u).flatten(2).flatten(0, 1))
        site.weight.add_(torch.cat(changes), alpha=self.scale)


@dataclass(frozen=True)
class FactTK(TuningMethod):
    """Changes the weights of all blocks by one Tucker decomposition of low rank, of which all is common to the model.

    The linear maps of the blocks are seen as D x D slots: q, k, v, the output map, and n slots each for the MLP's two
    maps (n = 4 in the plain ViT). Slot k changes by ``s V F_k^T U`` with ``F_k = C P_k``. With U (r x D), V (D x r),
    C (r x r x r) and a column of P (r) for each of the L (4 + 2 n) slots, ``2 D r + r^3 + L (4 + 2 n) r`` parameters
    are added and, until merged, ``(10 + 2 n) D r + (4 + 2 n) r^2`` MACs per token and block, and ``(4 + 2 n) r^3`` per
    pass and block for F; merged, none.

    Args:
        rank: r; the published runs choose it per task from 16 and 32.
        scale: factor s on every change; the published runs choose it per task from 0.01, 0.1, 1, 10 and 100.
        dropout: probability of dropping a hidden value in front of V while training.
        order: how the F of an MLP map's n slots make its change. interleaved, as in the public code and its
            checkpoints, reads the array F (r x r x n) as one r x n r matrix and cuts that, for the second map
            transposed, into n; contiguous, as in the paper's equation, takes F_k for slot k.
    """

    source: ClassVar[str] = "Jie and Deng, AAAI 2023, arXiv 2212.03145"
    published: ClassVar[dict[str, str]] = {
        r"^FacT([uv])\.": r"shared.fact-tk.\1.",
        r"^FacT([cp])$": r"shared.fact-tk.\1",
    }

    rank: int = 32
    scale: float = 1.0
    dropout: float = 0.1
    order: Order = "interleaved"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        width = backbone.one_width(self.name())
        sites = [(site, *site.slots(width)) for site in backbone.sites("qkv", "proj", "fc1", "fc2")]
        factors = Factors(width, self.rank, sum(inputs * outputs for _, inputs, outputs in sites))
        first = 0
        for site, inputs, outputs in sites:
            change = Tucker(factors, site.kind, first, inputs, outputs, self.scale, self.dropout, self.order)
            site.add("fact_tk", change)
            first += inputs * outputs
        backbone.shared[self.name()] = factors
