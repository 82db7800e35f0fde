"""Joint space-time ViTs made of image ViTs: one set of tokens for a whole clip, in the image model's own blocks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dyntune.backbones.families.frames import ClipHost, Frames
from dyntune.backbones.families.space_time import MOST_TOKENS
from dyntune.backbones.families.timm_vit import TimmViT
from dyntune.backbones.hosts import wrap_plain
from dyntune.backbones.origin import INFLATED, BackboneSource
from dyntune.core.errors import BackboneError
from dyntune.core.tokens import Tokens


class SliceTimes(nn.Module):
    """A learned vector for each slice of a clip, zero at first.

    Args:
        slices: S.
        width: channels C.
    """

    def __init__(self, slices: int, width: int) -> None:
        super().__init__()
        self.time = nn.Parameter(torch.zeros(slices, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """Adds them to the patches ``(B, S, P, C)``."""
        return x + self.time


class InflatedViT(ClipHost):
    """An image ViT on all tubelets of a clip together.

    A tubelet is embedded as the mean of its frames, which is what the image model's patch kernel makes of them when it
    is shared out over time. Each slice of tubelets has the image's positions and a learned vector of its own, which is
    trained and saved with the classifier. Class and register tokens are there once for the clip.

    Its attention has never compared slices: tune attention too (``lora``, ``full``), or start from VideoMAE.

    Args:
        vit: timm's ``VisionTransformer`` with a classifier that does not read every patch; used as it is.
        frames: T of a clip.
        tubelet: frames that a token is of.

    Raises:
        BackboneError: the model is of another kind, there are no whole tubelets, or more tokens than anybody computes.
    """

    def __init__(self, vit: nn.Module, frames: int = 8, tubelet: int = 2) -> None:
        super().__init__()
        inner = wrap_plain(vit)
        if not isinstance(inner, TimmViT) or inner.head_reads_grid:
            raise BackboneError(
                f"{type(vit).__name__} cannot take the tokens of a whole clip. Expected timm's VisionTransformer with "
                "global_pool='token' or a mean; any image model goes on each frame, with ClipClassifier."
            )
        if frames < 1 or tubelet < 1 or frames % tubelet:
            raise BackboneError(f"{frames} frames: expected whole tubelets of {tubelet} frames.")
        tokens = frames // tubelet * math.prod(inner.grid)
        if tokens > MOST_TOKENS:
            raise BackboneError(f"{frames} frames are {tokens} tokens; expected at most {MOST_TOKENS}. Give fewer.")
        self.vit, self.frames, self.tubelet = inner.host, frames, tubelet
        self.temporal = SliceTimes(frames // tubelet, inner.host.embed_dim)
        like = next(vit.parameters())
        self.temporal.to(device=like.device, dtype=like.dtype)


class Inflated(Frames):
    """An ``InflatedViT`` as a backbone.

    Args:
        host: the model; used as it is, its parameters stay where they are.
    """

    host: InflatedViT
    kind: ClassVar[type[ClipHost]] = InflatedViT
    supported: ClassVar[str] = "InflatedViT of timm's VisionTransformer, for clips"
    prefix: ClassVar[str] = INFLATED
    arguments: ClassVar[tuple[str, ...]] = ("frames", "tubelet")

    def origin(self) -> BackboneSource:
        source = self.inner.origin()
        if source.name is None:
            return source
        own = {"frames": self.host.frames, "tubelet": self.host.tubelet}
        return BackboneSource(f"{self.prefix}{source.name}", own | source.arguments, source.weights)

    def embed(self, images: Tensor) -> Tokens:
        self.check_clips(images)
        tubelets = images.unflatten(1, (self.slices, self.host.tubelet)).mean(2)
        tokens = self.inner.embed(tubelets.flatten(0, 1))
        x, prefix = tokens.x.unflatten(0, (-1, self.slices)), tokens.prefix
        patches = self.host.temporal(x[:, :, prefix:]).flatten(1, 2)
        rows, columns = tokens.grid
        return replace(tokens, x=torch.cat([x[:, 0, :prefix], patches], 1), grid=(self.slices * rows, columns))

    def readout(self, tokens: Tokens) -> Tensor:
        return self.inner.readout(tokens)

    def pooled(self, tokens: Tokens) -> Tensor:
        return self.inner.pooled(tokens)

    def unpooled(self, tokens: Tokens) -> Tensor:
        return self.inner.unpooled(tokens)

    def as_finished(self, x: Tensor) -> Tokens:
        if x.ndim != 3:
            raise BackboneError(
                f"expected tokens of a clip, (B, N, C), as forward_features gives them; given {tuple(x.shape)}."
            )
        return replace(self.inner.as_finished(x), grid=self.grid)

    @property
    def read_first(self) -> int | None:
        return self.inner.read_first

    @property
    def grid(self) -> tuple[int, int]:
        rows, columns = self.inner.grid
        return self.slices * rows, columns

    @property
    def slices(self) -> int:
        return self.host.frames // self.host.tubelet

    @property
    def idle(self) -> tuple[nn.Parameter, ...]:
        return self.inner.idle

    def published_name(self, name: str) -> str:
        return self.inner.published_name(name)
