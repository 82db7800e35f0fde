"""Adapter: a bottleneck behind a unit of the frozen backbone, on its update."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.parts.methods.base import Init, TuningMethod, initialise_bottleneck, quick_gelu

Activation = Literal["quick_gelu", "gelu", "relu"]

_ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "quick_gelu": quick_gelu,
    "gelu": F.gelu,
    "relu": F.relu,
}


class Bottleneck(nn.Module):
    """``u + W_up drop(act(W_down u + b_down)) + b_up`` for each token's update u.

    Args:
        width: channels C of a token.
        bottleneck: channels of the hidden layer.
        activation: between the two projections.
        dropout: probability of dropping a hidden value while training.
        init: "zero" starts as the identity, "noah" does not.
    """

    def __init__(self, width: int, bottleneck: int, activation: Activation, dropout: float, init: Init) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.activation = _ACTIVATIONS[activation]
        self.dropout = nn.Dropout(dropout)
        initialise_bottleneck(self.down_proj, self.up_proj, init)

    def forward(self, update: Tensor) -> Tensor:
        """What is added to the residual stream instead of ``update``, ``(..., C)``."""
        return update + self.up_proj(self.dropout(self.activation(self.down_proj(update))))


@dataclass(frozen=True)
class Adapter(TuningMethod):
    """Puts a bottleneck adapter behind each MLP; it reads the MLP's update, before that joins the residual stream.

    With ``u = mlp(norm2(z))``, after drop path, a block gives ``z + u + up(drop(act(down(u))))``. L blocks of width D
    add ``L * (2 D d + d + D)`` parameters and ``2 D d`` MACs per token and block; where="attn-mlp" doubles both. The
    default is what the VTAB tables call Adapter, where="attn-mlp" the placement of Houlsby et al. Unlike an adapter
    beside a unit, it stands in the unit's path: under token dispatch a token that skips the unit skips it too.

    Args:
        bottleneck: channels d of the adapter's hidden layer.
        dropout: probability of dropping a hidden value while training.
        activation: of the hidden layer; quick_gelu is x sigmoid(1.702 x).
        init: zero starts as the identity; noah is what the published runs began with, weights of both projections
            truncated normal of deviation 0.02, which changes the logits from the start.
        where: the units that get an adapter behind them.
    """

    source: ClassVar[str] = "Houlsby et al., ICML 2019, arXiv 1902.00751; for ViT as in NOAH, arXiv 2206.04673"
    stays: ClassVar[str | None] = "an adapter is not linear"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.adapter\.ln1\.": r"blocks.\1.mlp.sequential.adapter.down_proj.",
        r"^blocks\.(\d+)\.adapter\.ln2\.": r"blocks.\1.mlp.sequential.adapter.up_proj.",
    }

    bottleneck: int = 8
    dropout: float = 0.1
    activation: Activation = "quick_gelu"
    init: Init = "zero"
    where: Literal["mlp", "attn", "attn-mlp"] = "mlp"

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            unit.add_sequential(
                "adapter", Bottleneck(unit.width, self.bottleneck, self.activation, self.dropout, self.init)
            )
