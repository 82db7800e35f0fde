"""ConvPass: a convolutional bypass beside the attention and the MLP of each frozen block."""

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Parallel, SubLayer
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.base import TuningMethod, quick_gelu

Init = Literal["xavier", "identity"]


class ConvBypass(Parallel):
    """``s * droppath(W_up drop(g(conv(g(W_down y + b_down)))) + b_up)`` with g the QuickGELU; zero at the start.

    y is the output of the unit's norm. The 3 x 3 convolution runs over the grid of patches; every prefix token (class,
    register, prompt) is a map of 1 x 1 for it.

    Args:
        width: channels C of a token.
        bottleneck: channels of the convolution.
        scale: the factor s.
        dropout: probability of dropping a hidden value while training.
        init: of the convolution: "xavier", or "identity", which passes its input on.
        drop_path: probability of dropping the whole update of an image while training.
    """

    tokenwise = False
    reads_normed = True
    reads_grid = True

    def __init__(self, width: int, bottleneck: int, scale: float, dropout: float, init: Init, drop_path: float) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.conv = nn.Conv2d(bottleneck, bottleneck, 3, padding=1)
        self.up = nn.Linear(bottleneck, width)
        self.dropout = nn.Dropout(dropout)
        self.drop_path = StochasticDepth(drop_path, "row")
        self.scale = scale
        nn.init.xavier_uniform_(self.down.weight)
        initialise = nn.init.xavier_uniform_ if init == "xavier" else nn.init.dirac_
        initialise(self.conv.weight)
        for zero in (self.down.bias, self.conv.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)  # type: ignore[arg-type]

    def forward(self, tokens: Tokens) -> Tensor:
        """The update for every token, ``(B, N, C)``."""
        hidden = self.mix(quick_gelu(self.down(tokens.normed)), tokens.prefix, tokens.grid)
        return self.drop_path(self.up(self.dropout(quick_gelu(hidden)))) * self.scale

    def mix(self, hidden: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
        """The convolution of hidden tokens ``(B, N, h)``."""
        patches = hidden[:, prefix:].transpose(1, 2).unflatten(2, grid)  # (B, h, rows, columns)
        mixed = self.conv(patches).flatten(2).transpose(1, 2)
        if not prefix:
            return mixed
        alone = hidden[:, :prefix].flatten(0, 1)[:, :, None, None]  # (B * prefix, h, 1, 1)
        return torch.cat([self.conv(alone).flatten(1).unflatten(0, (-1, prefix)), mixed], dim=1)

    def fold_scale(self) -> None:
        """Multiplies the scale into the up-projection; the bypass computes the same."""
        with torch.no_grad():
            self.up.weight.mul_(self.scale)
            self.up.bias.mul_(self.scale)
        self.scale = 1.0


@dataclass(frozen=True)
class ConvPass(TuningMethod):
    """Puts a bottleneck with a 3 x 3 convolution over the patch grid beside each attention and each MLP.

    A block gives ``z = x + attn(norm1(x)) + s * bypass(norm1(x))``, then the same with its MLP and norm2. L blocks of
    width D add, for each bypass of h channels, ``L * (2 D h + D + 9 h^2 + 2 h)`` parameters and ``2 D h + 9 h^2`` MACs
    per token and block. Class, register and prompt tokens go through the convolution's centre tap, each by itself. Drop
    path, at the host's rate, is drawn for the bypass anew.

    Args:
        bottleneck: channels h of the convolution.
        scale: factor s on the bypass; the published runs choose it per task from 0.01, 0.1, 1, 10 and 100.
        dropout: probability of dropping a hidden value while training.
        init: of the convolution, xavier or identity; the published runs choose it per task.
        where: the units that get a bypass beside them; attn is the published ConvPass-attn.
    """

    source: ClassVar[str] = "Jie and Deng, 2022, arXiv 2207.07039"
    stays: ClassVar[str | None] = "a bypass is not linear; its scale is folded into the up-projection"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.adapter_(attn|mlp)\.adapter_(down|conv|up)\.": r"blocks.\1.\2.parallel.convpass.\3."
    }

    bottleneck: int = 8
    scale: float = 1.0
    dropout: float = 0.1
    init: Init = "xavier"
    where: Literal["attn-mlp", "attn", "mlp"] = "attn-mlp"

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        for unit in backbone.units(self.where):
            drop_path = cast(SubLayer, unit).drop_path_rate
            bypass = ConvBypass(unit.width, self.bottleneck, self.scale, self.dropout, self.init, drop_path)
            unit.add_parallel("convpass", bypass)
