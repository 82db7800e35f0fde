"""LoRA: low-rank updates of the frozen linear maps."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.backbones.sites import Change, Site
from dyntune.core.errors import BackboneError
from dyntune.parts.methods.base import Init, TuningMethod, initialise_low_rank

Target = Literal["qkv", "q", "k", "v", "proj", "fc1", "fc2"]


class LowRank(Change):
    """``y + s * B A x``.

    Args:
        inputs: channels of x.
        outputs: channels of y.
        rank: rows of A and columns of B.
        scale: the factor s.
        dropout: probability of dropping a value while training.
        dropout_on: whether x or A x is dropped from.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        rank: int,
        scale: float,
        dropout: float,
        dropout_on: Literal["input", "hidden"],
    ) -> None:
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)
        self.input_dropout = nn.Dropout(dropout if dropout_on == "input" else 0.0)
        self.hidden_dropout = nn.Dropout(dropout if dropout_on == "hidden" else 0.0)
        self.scale = scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return y + self.up(self.hidden_dropout(self.down(self.input_dropout(x)))) * self.scale

    @torch.no_grad()
    def fold(self, site: Site) -> None:
        site.weight.add_(self.scale * self.up.weight @ self.down.weight)


@dataclass(frozen=True)
class LoRA(TuningMethod):
    """Adds a low-rank update to linear maps: ``W x + b + s * B (A x)``; by default to the fused query-key-value map.

    With ``targets=qkv`` queries, keys and values share one A, which is the row of the VTAB-1K tables (NOAH's code);
    ``targets=q/v,dropout_on=hidden`` has an A of its own for each, as PETL-ViT's code. Both have ``4 D r`` parameters
    per block of width D. ``s`` is 1 in the first; PEFT's ``lora_alpha`` is ``s * r``. It folds into the weights; until
    then it costs as many MACs per token as it has parameters.

    Args:
        rank: rank r of the update.
        targets: the linear maps that are updated: qkv, q, k, v, proj, fc1, fc2.
        scale: factor s on the update.
        dropout: probability of dropping a value while training.
        dropout_on: drop from the input x, or from the hidden values A x.
        init: zero starts with B = 0, so that nothing changes at first; noah draws A and B from a normal distribution of
            deviation 0.02, which is what the published code does in effect.
    """

    source: ClassVar[str] = "Hu et al., ICLR 2022, arXiv 2106.09685; for ViT as in Zhang et al., 2022 (NOAH)"
    published: ClassVar[dict[str, str]] = {
        r"^blocks\.(\d+)\.attn\.LoRA_a\.": r"host.blocks.\1.attn.qkv.changes.lora.down.",
        r"^blocks\.(\d+)\.attn\.LoRA_b\.": r"host.blocks.\1.attn.qkv.changes.lora.up.",
        r"^blocks\.(\d+)\.attn\.lora_([qkv])\.adapter_(down|up)\.": r"host.blocks.\1.attn.qkv.changes.lora_\2.\3.",
    }

    rank: int = 8
    targets: tuple[Target, ...] = ("qkv",)
    scale: float = 1.0
    dropout: float = 0.1
    dropout_on: Literal["input", "hidden"] = "input"
    init: Init = "zero"

    def check(self) -> None:
        self.require(self.rank >= 1, "rank of at least 1")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")
        self.require(bool(self.targets) and len(set(self.targets)) == len(self.targets), "each target once")

    def install(self, backbone: Backbone) -> None:
        for target in self.targets:
            for site in backbone.sites(target):
                if not isinstance(site.module, nn.Linear):
                    raise BackboneError(
                        f"lora updates Linear layers, but {site.path} is a {type(site.module).__name__}."
                    )
                change = LowRank(site.inputs, site.channels, self.rank, self.scale, self.dropout, self.dropout_on)
                initialise_low_rank(change.down, change.up, self.init)
                site.add("lora", change)
