"""VPT: learnable prompt tokens among the tokens of the frozen backbone."""

import math
import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.tokens import Tokens
from dyntune.parts.methods.base import TuningMethod


class Prompts(nn.Module):
    """Puts p learnable tokens into every image, in place of those that were inserted before.

    Args:
        count: number p of prompts.
        width: channels C of a token.
        bound: prompts start uniform in (-bound, bound).
        dropout: probability of dropping a value of a prompt while training, drawn anew for each image.
    """

    def __init__(self, count: int, width: int, bound: float, dropout: float) -> None:
        super().__init__()
        self.prompts = nn.Parameter(torch.empty(count, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens with the prompts behind the host's own prefix tokens."""
        return tokens.with_prompts(self.dropout(self.prompts.expand(tokens.x.shape[0], -1, -1)))


@dataclass(frozen=True)
class Vpt(TuningMethod):
    """Adds prompt tokens to the input of each block (VPT-deep) or of the first one (VPT-shallow).

    ``[prefix, prompts, patches]`` enters the first block. Deep: in front of every later block what has become of the
    prompts is replaced by the block's own. Shallow: the first block's prompts go through all blocks. The head never
    sees them: they are dropped behind the last norm, before pooling. Prompts have no position embedding and start
    uniform in (-v, v), ``v = sqrt(6 / (f + D))`` with f the inputs of the patch embedding (``3 * patch * patch``), or D
    where a stem has none.

    With L blocks of width D and MLP width H, p prompts are ``p D L`` parameters, shallow ``p D``. Either way N tokens
    become N + p: ``p (4 D^2 + 2 D H + 10 D) + 2 D ((N + p)^2 - N^2)`` more MACs in every block, ``5 p D`` more in the
    last norm. Under token dispatch prompts are always computed.

    Args:
        prompts: number p of prompts in a block.
        deep: whether each block has prompts of its own, instead of the first block alone.
        dropout: probability of dropping a value of a prompt while training, for each image on its own; the published
            demonstration of VPT-deep uses 0.1.
    """

    source: ClassVar[str] = "Jia et al., ECCV 2022, arXiv 2203.12119"
    stays: ClassVar[str | None] = "prompts are tokens that attention computes with, not a change of its weights"

    prompts: int = 8
    deep: bool = True
    dropout: float = 0.0

    def check(self) -> None:
        self.require(self.prompts >= 1, "at least 1 prompt (none is linear)")
        self.require(0 <= self.dropout < 1, "dropout in [0, 1)")

    def install(self, backbone: Backbone) -> None:
        width = backbone.blocks[0].width
        # A stem without a map of its own to tokens gives each patch as many values as a token has.
        inputs = next((site.weight[0].numel() for site in backbone.sites("patch")), width)
        bound = math.sqrt(6 / (inputs + width))
        for block in backbone.blocks if self.deep else backbone.blocks[:1]:
            block.add_prompts("vpt", Prompts(self.prompts, block.width, bound, self.dropout))

    def from_published(self, name: str, tensor: Tensor) -> dict[str, Tensor] | None:
        if name.startswith("head.last_layer."):
            return {name.replace("head.last_layer.", "host.head."): tensor}
        match = re.search(r"(?:^|\.)transformer\.(deep_)?prompt_embeddings$", name)
        if match is None:
            return None
        first = 1 if match.group(1) else 0
        return {f"blocks.{block}.prompts.vpt.prompts": prompts for block, prompts in enumerate(tensor, first)}
