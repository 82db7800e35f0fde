"""EViT: the patches that the class token attends to least are fused into one token, between attention and MLP."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.base import Backbone
from dyntune.core.errors import BackboneError, TrainingError
from dyntune.core.matching import taken
from dyntune.core.tokens import Projected, Tokens
from dyntune.parts.policies.reducing import Reducer, ReducingPolicy


class KeepSchedule(nn.Module):
    """Lets all keep rates fall from 1 to their final values in training; in evaluation the final values hold.

    Args:
        start: epochs in which every patch is kept.
        shrink: epochs after those in which the rates fall, along half a cosine.
    """

    def __init__(self, start: float, shrink: float) -> None:
        super().__init__()
        self.start = start
        self.shrink = shrink
        self.remaining = 0.0
        """Share of the way from 1 to the final rate that is still to go."""

    def begin_step(self, epoch: float | None = None, progress: float | None = None) -> None:
        """Moves to a training step after ``epoch`` epochs.

        Raises:
            TrainingError: the rates change, but nobody counts the epochs.
        """
        if not self.start + self.shrink:
            return
        if epoch is None:
            raise TrainingError(
                "evit: start_epochs and shrink_epochs need to know the epoch of a training step; none was given. "
                "Give training_loss(..., epoch=...), or leave both options at 0."
            )
        since = epoch - self.start
        if since < 0:
            self.remaining = 1.0
        else:
            self.remaining = (1 + math.cos(math.pi * since / self.shrink)) / 2 if since < self.shrink else 0.0

    def rate(self, keep: float) -> float:
        """The rate that holds now in a block whose final one is ``keep``."""
        return keep + (1 - keep) * self.remaining if self.training else keep


class Shrinking(Reducer):
    """Keeps the share of the patches that the class token attends to most.

    Args:
        keep: the share, once the schedule is through.
        fuse: whether the others become one token instead of vanishing.
        schedule: of all blocks.
    """

    def __init__(self, keep: float, fuse: bool, schedule: KeepSchedule) -> None:
        super().__init__()
        self.keep = keep
        self.fuse = fuse
        self.schedule = schedule

    def forward(self, tokens: Tokens, projected: Projected | None) -> Callable[[Tokens], Tokens] | None:
        assert projected is not None  # installed in front of an MLP
        count = tokens.patches.shape[1]
        kept = math.ceil(self.schedule.rate(self.keep) * count)
        if kept >= count:
            return None
        scores = class_attention(projected.q, projected.k, projected.bias)[:, tokens.prefix :]
        order = scores.argsort(dim=-1, descending=True, stable=True)
        weights = scores.gather(1, order[:, kept:]).unsqueeze(-1)
        place = torch.arange(count, device=order.device)
        place = place.clamp_max(kept) if self.fuse else place.masked_fill(place >= kept, -1)
        moved = torch.zeros_like(order).scatter(1, order, place.expand_as(order))

        def shrink(tokens: Tokens) -> Tokens:
            ordered = taken(tokens.patches, order)
            patches = ordered[:, :kept]
            if self.fuse:
                fused = (ordered[:, kept:] * weights).sum(1, keepdim=True)
                patches = torch.cat([patches, fused.to(patches.dtype)], dim=1)
            return tokens.with_patches(patches, moved)

        return shrink


def class_attention(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """How much the class token, the first one, attends to each token: ``(B, N)``, the mean over heads.

    Args:
        q, k: queries and keys of all tokens, each ``(B, N, H, D)``.
        bias: ``(1 or B, H, N, N)``, added to the logits.
    """
    logits = torch.einsum("bhd,bnhd->bhn", q[:, 0], k).float() * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias[:, :, 0]).softmax(-1).mean(1)


@dataclass(frozen=True)
class EViT(ReducingPolicy):
    """Keeps, in some blocks, the patches that the class token attends to most, and fuses the others into one token.

    Between attention and MLP, patch j has the score ``a_j``, the class token's attention weight for it in the block's
    softmax over all tokens, averaged over heads. Of P patches the ``ceil(keep * P)`` with the highest scores go on, in
    falling order. Behind them comes one token for the others, ``sum_j a_j x_j``: the scores are not divided by their
    sum, and gradients flow through them into queries and keys. Later blocks rank that token like any patch. All prefix
    tokens (class, distillation, register, prompts) are kept. In a mean over tokens each one left counts alike.

    There are no parameters. With N tokens in front of it, choosing costs N D MACs in a block.

    The public code differs in two points. There, evaluation during training takes the keep rate that training has
    reached; here ``keep`` holds in every evaluation. There, scores are read behind attention dropout; here they have no
    such noise.

    Args:
        keep: share of the patches that go on, above 0 and at most 1; or a list with a share for each of ``layers``.
        layers: numbers of the blocks that shrink, counted from 0.
        fuse: whether the other patches become one token; if not, they are dropped.
        start_epochs: epochs at the start of the training in which every patch is kept.
        shrink_epochs: epochs after those in which the share falls from 1 to ``keep``, along half a cosine.
    """

    source: ClassVar[str] = "Liang et al., ICLR 2022, arXiv 2202.07800"

    keep: float | tuple[float, ...] = 0.7
    layers: tuple[int, ...] = (3, 6, 9)
    fuse: bool = True
    start_epochs: float = 0.0
    shrink_epochs: float = 0.0

    def check(self) -> None:
        self.require(bool(self.layers), "at least one block in layers")
        self.require(len(set(self.layers)) == len(self.layers), "each block once in layers")
        self.require(min(self.layers) >= 0, "block numbers of at least 0 in layers")
        self.require(len(self.rates) == len(self.layers), "one number in keep, or as many as in layers")
        self.require(all(0 < rate <= 1 for rate in self.rates), "keep above 0 and at most 1")
        self.require(min(self.start_epochs, self.shrink_epochs) >= 0, "numbers of epochs of at least 0")

    @property
    def drops(self) -> bool:
        return not self.fuse

    @property
    def rates(self) -> tuple[float, ...]:
        """The final keep rate in each of ``layers``."""
        return self.keep if isinstance(self.keep, tuple) else (self.keep,) * len(self.layers)

    def install(self, backbone: Backbone) -> None:
        if not backbone.class_token:
            raise BackboneError(
                "evit: patches are ranked by the class token's attention, and this backbone has no class token. "
                "Use a backbone with one, or tome, which needs none."
            )
        depth = len(backbone.blocks)
        self.require(max(self.layers) < depth, f"block numbers from 0 to {depth - 1} in layers, as the backbone has")
        schedule = KeepSchedule(self.start_epochs, self.shrink_epochs)
        backbone.shared[self.name()] = schedule
        for layer, keep in zip(self.layers, self.rates, strict=True):
            backbone.blocks[layer].mlp.add_reducer(self.name(), Shrinking(keep, self.fuse, schedule))
