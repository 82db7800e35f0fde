"""FacT-TT: one tensor-train decomposition of the changes of all weights of the blocks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.sites import Change, Site
from dyntune.parts.methods.base import TuningMethod


class Factors(nn.Module):
    """The outer factors U (r x D) and V (D x r), which all places share; V is zero at the start."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Linear(width, rank, bias=False)
        self.v = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.v.weight)


class TensorTrain(Change):
    """Adds ``s * V drop(S U x)`` to the output, where U and V act on each D channels of the input and output.

    Args:
        factors: U and V.
        maps: one core S for each of them; their outputs stand one after the other.
        inputs: chunks of D channels that a map reads.
        outputs: chunks of D channels that a map gives.
        scale: the factor s.
        dropout: probability of dropping a hidden value in front of V while training.
    """

    factors: Factors

    def __init__(
        self, factors: Factors, maps: Sequence[str], inputs: int, outputs: int, scale: float, dropout: float
    ) -> None:
        super().__init__()
        # Not registered: the backbone owns them, and they must not appear once more at each place.
        object.__setattr__(self, "factors", factors)
        rank = factors.u.out_features
        self.cores = nn.ModuleDict({name: nn.Linear(inputs * rank, outputs * rank, bias=False) for name in maps})
        self.chunks = inputs, outputs
        self.scale = scale
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.scale * torch.cat([self._update(x, core) for core in self.cores.values()], dim=-1)

    def _update(self, x: Tensor, core: nn.Module) -> Tensor:
        inputs, outputs = self.chunks
        hidden = self.dropout(core(self.factors.u(x.unflatten(-1, (inputs, -1))).flatten(-2)))
        return self.factors.v(hidden.unflatten(-1, (outputs, -1))).flatten(-2)

    @torch.no_grad()
    def fold(self, site: Site) -> None:
        inputs, outputs = self.chunks
        u, v = self.factors.u.weight, self.factors.v.weight
        changes = []
        for core in self.cores.values():
            s = cast(nn.Linear, core).weight.unflatten(1, (inputs, -1)).unflatten(0, (outputs, -1))
            changes.append(torch.einsum("op,bpaq,qi->boai", v, s, u).flatten(2).flatten(0, 1))
        site.weight.add_(torch.cat(changes), alpha=self.scale)


@dataclass(frozen=True)
class FactTT(TuningMethod):
    """Changes the weights of all blocks by one tensor train of low rank, of which only small cores differ by place.

    The linear maps of the blocks are seen as D x D slots: q, k, v, the output map, and n slots each for the MLP's two
    maps (n = 4 in the plain ViT). A slot changes by ``s V S U``; U (r x D) and V (D x r) are common to the model. L
    blocks add ``2 D r + L (4 + 2 n) r^2`` parameters and, until merged, ``(10 + 2 n) D r + (4 + 2 n) r^2`` MACs per
    token and block; merged, none.

    Args:
        rank: r; the published runs choose it per task from 4, 8 and 16.
        scale: factor s on every change; the published runs choose it per task from 0.01, 0.1, 1, 10 and 100.
        dropout: probability of dropping a hidden value in front of V while training.
    """

    source: ClassVar[str] = "Jie and Deng, AAAI 2023, arXiv 2212.03145"
    published: ClassVar[dict[str, str]] = {
        r"^FacT([uv])\.": r"shared.fact-tt.\1.",
        r"^blocks\.(\d+)\.attn\.([qkv])_FacTs\.": r"host.blocks.\1.attn.qkv.changes.fact_tt.cores.\2.",
        r"^blocks\.(\d+)\.(attn|mlp)\.(proj|fc1|fc2)_FacTs\.": r"host.blocks.\1.\2.\3.changes.fact_tt.cores.\3.",
    }

    rank: int = 16
    scale: float = 1.0
    dropout: float = 0.1

    def check(self) -> None:
        self.require(self.rank >= 1, "rank of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        width = backbone.one_width(self.name())
        factors = Factors(width, self.rank)
        for site in backbone.sites("qkv", "proj", "fc1", "fc2"):
            inputs, outputs = site.slots(width)
            change = TensorTrain(factors, site.parts, inputs, outputs // len(site.parts), self.scale, self.dropout)
            site.add("fact_tt", change)
        backbone.shared[self.name()] = factors
