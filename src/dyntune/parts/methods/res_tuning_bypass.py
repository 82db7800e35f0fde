"""Res-Tuning-Bypass: a stream of tuners beside the frozen blocks, which the head reads instead of theirs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone, Bypass
from dyntune.core.errors import BackboneError
from dyntune.core.words import counted
from dyntune.parts.methods.base import TuningMethod, initialise_tuner

Scale = float | Literal["learnable", "channel", "gate"]
Merging = Literal["sum", "average"]


class Tuner(nn.Module):
    """``y + s * (W_up gelu(W_down y + b_down) + b_up)`` for each token y.

    Args:
        width: channels C of a token.
        bottleneck: channels of the hidden layer.
        scale: the factor s; "learnable" or "channel" for a trained one, of all channels or of each, that starts at 1;
            "gate" for the mean over the image's tokens of a sigmoid of a linear map of the bracket.
        identity: whether it starts as the identity.
    """

    def __init__(self, width: int, bottleneck: int, scale: Scale, identity: bool) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.scale: float | nn.Parameter | nn.Linear
        if scale == "gate":
            self.scale = nn.Linear(width, 1)
        elif isinstance(scale, str):
            self.scale = nn.Parameter(torch.ones(1 if scale == "learnable" else width))
        else:
            self.scale = scale
        initialise_tuner(self.down_proj, self.up_proj, identity)

    def forward(self, y: Tensor) -> Tensor:
        """``(B, N, C)`` to the same shape."""
        update = self.up_proj(F.gelu(self.down_proj(y)))
        if isinstance(self.scale, nn.Linear):
            return y + update * self.scale(update).sigmoid().mean(1, keepdim=True)
        return y + update * self.scale


class TunerBypass(Bypass):
    """The stream: after each block a tuner of the block's output and a tuner of the stream are merged.

    Args:
        width: channels C of a token.
        bottlenecks: channels of the tuners' hidden layer, for each block.
        scale: as for ``Tuner``.
        merging: "sum", or "average" with a trained share per block.
        zero_init_last: whether the last block's tuners start as the identity.
    """

    def __init__(
        self, width: int, bottlenecks: Sequence[int], scale: Scale, merging: Merging, zero_init_last: bool
    ) -> None:
        super().__init__()

        def tuners() -> nn.ModuleList:
            identity = [False] * (len(bottlenecks) - 1) + [zero_init_last]
            return nn.ModuleList(
                Tuner(width, bottleneck, scale, start) for bottleneck, start in zip(bottlenecks, identity, strict=True)
            )

        self.lateral = tuners()
        self.vertical = tuners()
        self.share = nn.Parameter(torch.zeros(len(bottlenecks))) if merging == "average" else None

    def begin(self, x: Tensor) -> Tensor:
        return x

    def step(self, block: int, stream: Tensor, x: Tensor) -> Tensor:
        lateral, vertical = self.lateral[block](x), self.vertical[block](stream)
        if self.share is None:
            return lateral + vertical
        share = self.share[block].sigmoid()
        return share * lateral + (1 - share) * vertical


@dataclass(frozen=True)
class ResTuningBypass(TuningMethod):
    """Puts a stream of tuners beside the frozen blocks, so that no gradient has to go through the backbone.

    The stream b starts as what enters the first block, ``b_0 = x_0``; after block i ``b_i = R_i(x_i) + S_i(b_{i-1})``
    with x_i the block's output and the tuners R and S each ``y + W_up gelu(W_down y + b_down) + b_up``. The last norm
    and the head read ``b_L`` instead of ``x_L``, so logits differ from the host's from the start. L blocks of width D
    add ``2 L (2 D d + d + D)`` parameters and ``4 D d`` MACs per token and block. It goes alone: whatever else is
    trained in the backbone would get no gradient.

    Args:
        bottleneck: channels d of each tuner's hidden layer; one number, or one for each block, such as 8/16/32.
        zero_init_last: whether the last block's tuners start as the identity; the others' weights always start
            Xavier-uniform, their biases normal of deviation 1e-6.
        scale: factor on each tuner's update; learnable and channel train it, for all channels or each, from 1; gate
            computes it for each image from the update.
        merging: sum as in the authors' code, or as in their paper average, ``l R_i + (1 - l) S_i``; that l is trained
            for each block, as the sigmoid of a number that starts at 0, is our choice.
    """

    source: ClassVar[str] = "Jiang et al., NeurIPS 2023, arXiv 2310.19859, section on Res-Tuning-Bypass"
    stays: ClassVar[str | None] = "its stream runs beside the blocks, whose weights know nothing of it"
    published: ClassVar[dict[str, str]] = {
        r"^restuning_[^.]+\.bypass_blocks\.(\d+)\.(lateral|vertical)_tuner\.tuner\.ln1\.": r"bypass.\2.\1.down_proj.",
        r"^restuning_[^.]+\.bypass_blocks\.(\d+)\.(lateral|vertical)_tuner\.tuner\.ln2\.": r"bypass.\2.\1.up_proj.",
        r"^restuning_[^.]+\.bypass_blocks\.(\d+)\.(lateral|vertical)_tuner\.tuner\.scaling": r"bypass.\2.\1.scale",
    }

    bottleneck: int | tuple[int, ...] = 32
    zero_init_last: bool = False
    scale: Scale = 1.0
    merging: Merging = "sum"

    def check(self) -> None:
        sizes = (self.bottleneck,) if isinstance(self.bottleneck, int) else self.bottleneck
        self.require(len(sizes) > 0 and min(sizes) >= 1, "bottleneck of at least 1, or one such number for each block")

    def install(self, backbone: Backbone) -> None:
        count = len(backbone.blocks)
        sizes = (self.bottleneck,) * count if isinstance(self.bottleneck, int) else self.bottleneck
        if len(sizes) != count:
            raise BackboneError(
                f"{self.name()}: bottleneck has {len(sizes)} numbers, but the backbone {counted(count, 'block')}; "
                "give one for each block, or a single one for all."
            )
        if backbone.bypass is not None:
            raise BackboneError(f"{self.name()}: the backbone has a bypass already, and the head reads one; give one.")
        width = backbone.one_width(self.name())
        backbone.bypass = TunerBypass(width, sizes, self.scale, self.merging, self.zero_init_last)
