"""Temporal heads: what becomes of the features of a clip's frames, in front of the classifier."""

from __future__ import annotations

import abc
from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from dyntune.core.attention import bias_of
from dyntune.core.errors import BackboneError, unknown_name

Temporal = Literal["mean", "attentive", "mixer"]
"""The mean of the frames' features; one query that attends to the tokens of all frames, as published with DyT; one
transformer layer over the frames' features, then their mean."""
Time = Literal["none", "learned"]
"""Whether a learned vector for each place in time is added first. Without it no head can see the order of frames."""


class TemporalHead(nn.Module, abc.ABC):
    """From what frames give to one vector per clip.

    Args:
        frames: T of a clip.
        width: channels C.
        time: see ``Time``.
    """

    reads_tokens: ClassVar[bool] = False
    """Whether it reads all tokens, ``(B, T, N, C)``, instead of pooled features, ``(B, T, C)``."""

    def __init__(self, frames: int, width: int, time: Time) -> None:
        super().__init__()
        self.register_parameter("time", None)
        if time == "learned":
            self.time = nn.Parameter(nn.init.trunc_normal_(torch.empty(frames, 1, width), std=0.02))

    def timed(self, x: Tensor) -> Tensor:
        """Frames' tokens ``(B, T, N, C)`` with what is learned of their places in time."""
        return x if self.time is None else x + self.time

    @abc.abstractmethod
    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Clips' features to ``(B, C)``.

        Args:
            x: ``(B, T, N, C)``, or ``(B, T, C)`` without ``reads_tokens``.
            weights: ``(B, T, N)``, how much each token counts, for one that reads them; None where all count alike.
        """


class Mean(TemporalHead):
    """The mean of the frames' features."""

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return x.mean(1)


class Mixer(TemporalHead):
    """One pre-norm transformer layer over the frames' features, then their mean.

    Args:
        heads: of its attention.
    """

    def __init__(self, frames: int, width: int, time: Time, heads: int) -> None:
        super().__init__(frames, width, time)
        self.layer = Block(width, heads, qkv_bias=True)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.layer(self.timed(x.unsqueeze(2)).squeeze(2)).mean(1)


class Attentive(TemporalHead):
    """One learned query that attends to the tokens of all frames, without residual, MLP or norm behind.

    DyT's public code for videos has this head, with ``time="none"``; its names are those of that code's tensors.

    Args:
        heads: of its attention.
    """

    reads_tokens = True

    def __init__(self, frames: int, width: int, time: Time, heads: int) -> None:
        super().__init__(frames, width, time)
        self.heads = heads
        self.query_token = nn.Parameter(torch.zeros(1, 1, width))
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.q, self.k, self.v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.q_bias, self.v_bias = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        x = self.timed(x).flatten(1, 2)
        mask = None if weights is None else bias_of(weights.flatten(1), x.dtype)[:, None, None]
        q = self.q(self.norm_q(self.query_token)) + self.q_bias
        k, v = self.k(self.norm_k(x)), self.v(self.norm_v(x)) + self.v_bias
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        read = F.scaled_dot_product_attention(q.expand(x.shape[0], -1, -1, -1), k, v, attn_mask=mask)
        return self.proj(read.transpose(1, 2).flatten(2)).squeeze(1)


def temporal_head(kind: str, time: str | None, frames: int, width: int, heads: int) -> TemporalHead:
    """A new temporal head.

    Args:
        kind: see ``Temporal``.
        time: see ``Time``; None for what suits the kind.
        frames: T of a clip.
        width: channels C.
        heads: of its attention, if it has one.

    Raises:
        BackboneError: there is no such head.
    """
    if kind not in get_args(Temporal):
        raise BackboneError(unknown_name("temporal head", kind, get_args(Temporal)))
    time = time or ("none" if kind == "mean" else "learned")
    if time not in get_args(Time):
        raise BackboneError(unknown_name("time", time, get_args(Time)))
    if frames < 1:
        raise BackboneError(f"frames={frames}: expected at least 1.")
    if kind == "mean":
        if time == "learned":
            raise BackboneError(
                "time=learned does nothing in front of a mean, which cannot see the order of frames. Give "
                "temporal=attentive or temporal=mixer, or time=none."
            )
        return Mean(frames, width, "none")
    learned: Time = "learned" if time == "learned" else "none"
    return (Attentive if kind == "attentive" else Mixer)(frames, width, learned, heads)
