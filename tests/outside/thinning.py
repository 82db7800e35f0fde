"""A reducing policy: in front of the second block every other patch is dropped."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from dyntune.core.matching import taken
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy


class EveryOther(Reducer):
    def forward(self, tokens, projected):
        images, count, _ = tokens.patches.shape
        number = torch.arange(count, device=tokens.x.device)
        kept = number[::2].expand(images, -1)
        moved = torch.where(number % 2 == 0, number // 2, -1).expand(images, -1)
        return lambda tokens: tokens.with_patches(taken(tokens.patches, kept), moved)


@dataclass(frozen=True)
class Thinning(ReducingPolicy):
    """Drops every other patch in front of the second block; nothing is trained."""

    source: ClassVar[str] = "another distribution"

    @property
    def drops(self):
        return True

    def install(self, backbone):
        backbone.blocks[1].add_reducer(self.name(), EveryOther())
