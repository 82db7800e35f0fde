"""AdaptFormer: a bottleneck adapter in parallel to a unit of the frozen backbone."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Parallel, Where
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.base import TuningMethod


class Adapter(Parallel):
    """``s * (W_up drop(relu(W_down x + b_down)) + b_up)`` for each token x; zero at the start.

    Args:
        width: channels C of a token.
        bottleneck: channels of the hidden layer.
        scale: the factor s, or "learnable" for a trained scalar that starts at 1.
        dropout: probability of dropping a hidden value while training.
        bias: whether the projections have biases.
    """

    def __init__(
        self, width: int, bottleneck: int, scale: float | Literal["learnable"], dropout: float, bias: bool = True
    ) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck, bias)
        self.up_proj = nn.Linear(bottleneck, width, bias)
        self.dropout = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(())) if scale == "learnable" else scale
        nn.init.kaiming_uniform_(self.down_proj.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up_proj.weight)
        for linear in (self.down_proj, self.up_proj) if bias else ():
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tokens) -> Tensor:
        """The update for every token, of the shape of ``tokens.x``."""
        return self.up_proj(self.dropout(F.relu(self.down_proj(tokens.x)))) * self.scale

    def fold_scale(self) -> None:
        """Multiplies the scale into the up-projection; the adapter computes the same."""
        with torch.no_grad():
            for parameter in self.up_proj.parameters():
                parameter.mul_(self.scale)
        del self.scale
        self.scale = 1.0


@dataclass(frozen=True)
class AdaptFormer(TuningMethod):
    """Puts a bottleneck adapter beside each MLP; it reads the un-normalised residual stream and sees every token.

    With z the residual stream after attention, a block gives ``z + mlp(norm2(z)) + s * up(relu(down(z)))``. L blocks of
    width D add ``L * (2 D d + d + D)`` parameters and ``2 D d`` MACs per token and block.

    Args:
        bottleneck: channels d of the adapter's hidden layer.
        scale: factor s on the adapter's output; "learnable" trains one scalar per adapter.
        dropout: probability of dropping a hidden value while training.
        where: the units that get an adapter beside them.
        bias: whether the projections have biases; those of PETL-ViT, which VTAB tables call AdaptFormer too,
            have none.
    """

    source: ClassVar[str] = "Chen et al., NeurIPS 2022, arXiv 2205.13535"
    stays: ClassVar[str | None] = "an adapter is not linear; its scale is folded into the up-projection"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.adaptmlp\.": r"blocks.\1.mlp.parallel.adapter.",
        r"^blocks\.(\d+)\.adapter_mlp\.adapter_(down|up)\.": r"blocks.\1.mlp.parallel.adapter.\2_proj.",
    }

    bottleneck: int = 8
    scale: float | Literal["learnable"] = 0.1
    dropout: float = 0.1
    where: Where = "mlp"
    bias: bool = True

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            unit.add_parallel("adapter", Adapter(unit.width, self.bottleneck, self.scale, self.dropout, self.bias))
