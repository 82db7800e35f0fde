"""SSF: a trained scale and shift per channel behind every linear map, convolution and norm."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.sites import Change, Site
from dyntune.core.errors import BackboneError
from dyntune.parts.methods.base import TuningMethod


class ScaleShift(Change):
    """``y * scale + shift``, per channel.

    Args:
        channels: of y.
        channel_dim: the dimension of y that they lie along.
        std: standard deviation of scale around 1 and of shift around 0 at the start.
    """

    def __init__(self, channels: int, channel_dim: int, std: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + std * torch.randn(channels))
        self.shift = nn.Parameter(std * torch.randn(channels))
        self.channel_dim = channel_dim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        if self.channel_dim == 1:
            return y * self.scale[:, None, None] + self.shift[:, None, None]
        return y * self.scale + self.shift

    @torch.no_grad()
    def fold(self, site: Site) -> None:
        weight, bias = site.weight, site.bias
        weight.mul_(self.scale.view(-1, *[1] * (weight.ndim - 1)))
        site.set_bias(self.shift if bias is None else bias * self.scale + self.shift)


@dataclass(frozen=True)
class SSF(TuningMethod):
    """Scales and shifts each channel behind the patch embedding, every norm, and every linear map of the blocks.

    ``y <- gamma * y + beta`` at six sites per block and two outside: after the patch embedding's projection, norm1, the
    query-key-value map, the attention's output map, norm2, fc1 (before its activation), fc2, and the last norm. A block
    of width D and MLP width H has ``2 (7 D + H)`` parameters, the two sites outside have ``4 D``; it all folds into the
    weights, so that a merged model costs what the plain one does. A norm in front of the blocks (CLIP), norms of
    queries and keys, and LayerScale are left alone. On Swin the norm of the patch embedding and those between stages
    are scaled too, as published.

    Args:
        init_std: standard deviation of gamma around 1 and of beta around 0 at the start; 0 starts as the identity.
    """

    source: ClassVar[str] = "Lian et al., NeurIPS 2022, arXiv 2210.08823"
    published: ClassVar[dict[str, str]] = {
        r"^patch_embed\.ssf_(scale|shift)_1$": r"host.patch_embed.proj.changes.ssf.\1",
        r"^blocks\.(\d+)\.ssf_(scale|shift)_([12])$": r"host.blocks.\1.norm\3.changes.ssf.\2",
        r"^blocks\.(\d+)\.attn\.ssf_(scale|shift)_1$": r"host.blocks.\1.attn.qkv.changes.ssf.\2",
        r"^blocks\.(\d+)\.attn\.ssf_(scale|shift)_2$": r"host.blocks.\1.attn.proj.changes.ssf.\2",
        r"^blocks\.(\d+)\.mlp\.ssf_(scale|shift)_([12])$": r"host.blocks.\1.mlp.fc\3.changes.ssf.\2",
        r"^ssf_(scale|shift)_1$": r"host.norm.changes.ssf.\1",
    }

    init_std: float = 0.02

    def check(self) -> None:
        self.require(self.init_std >= 0, "init_std of at least 0")

    def install(self, backbone: Backbone) -> None:
        for site in backbone.sites():
            if getattr(site.module, "weight", None) is None or not hasattr(site.module, "bias"):
                raise BackboneError(
                    f"ssf scales and shifts each channel, but {site.path} is a {type(site.module).__name__} without "
                    "weight and bias to fold that into. Expected LayerNorm, Linear and Conv2d."
                )
            site.add("ssf", ScaleShift(site.channels, site.channel_dim, self.init_std))
