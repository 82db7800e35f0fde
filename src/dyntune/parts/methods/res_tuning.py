"""Res-Tuning: bottleneck tuners in parallel with attention, MLP and the whole block."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.units import Parallel
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.base import TuningMethod, initialise_tuner

Init = Literal["zero", "xavier"]


class Tuner(Parallel):
    """``W_up gelu(W_down y + b_down) + b_up`` for each token, with y what the operation beside it reads.

    Args:
        width: channels C of a token.
        bottleneck: channels of the hidden layer.
        reads_normed: whether y is the output of the unit's norm instead of the residual stream.
        init: "zero" gives no update at the start, "xavier" does.
    """

    def __init__(self, width: int, bottleneck: int, reads_normed: bool, init: Init) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, bottleneck)
        self.up_proj = nn.Linear(bottleneck, width)
        self.reads_normed = reads_normed
        initialise_tuner(self.down_proj, self.up_proj, init == "zero")

    def forward(self, tokens: Tokens) -> Tensor:
        """The update for every token, of the shape of ``tokens.x``."""
        return self.up_proj(F.gelu(self.down_proj(tokens.normed if self.reads_normed else tokens.x)))


@dataclass(frozen=True)
class ResTuning(TuningMethod):
    """Puts three bottleneck tuners into each block (a reconstruction: no code of the paper's ViT was released).

    Every operation gets a tuner in parallel that reads what the operation reads: ``z = x + attn(n1) + t1(n1)`` with
    ``n1 = norm1(x)``, then ``z + mlp(n2) + t2(n2) + t3(x)`` with ``n2 = norm2(z)``, each
    ``t(y) = W_up gelu(W_down y + b_down) + b_up``. L blocks of width D add ``3 L (2 D d + d + D)`` parameters and
    ``6 D d`` MACs per token and block; the default agrees with the published sizes. Under token dispatch the tuners
    beside a gated unit see every token; a gate around a block stops the two tuners inside it.

    Args:
        bottleneck: channels d of each tuner's hidden layer.
        init: zero starts without an update; xavier starts both projections as the authors' component for the bypass
            does, which changes the logits from the start.
    """

    source: ClassVar[str] = "Jiang et al., NeurIPS 2023, arXiv 2310.19859"
    stays: ClassVar[str | None] = "a tuner is not linear"

    bottleneck: int = 8
    init: Init = "zero"

    def check(self) -> None:
        self.require(self.bottleneck >= 1, "bottleneck of at least 1")

    def install(self, backbone: Backbone) -> None:
        for block in backbone.blocks:
            for unit, reads_normed in ((block.attn, True), (block.mlp, True), (block, False)):
                unit.add_parallel("res_tuning", Tuner(unit.width, self.bottleneck, reads_normed, self.init))
