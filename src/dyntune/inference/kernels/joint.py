"""Triton kernel: the gate's logits and the residual stream behind the adapter, in one pass over the tokens."""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dyntune.inference.kernels.arithmetic import dot, precision

_TOKENS = 32
_WIDEST = 128
"""The widest hidden layer whose values a program can hold in registers."""


def joint(x: Tensor, read_weight: Tensor, read_bias: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """``x + relu(x W^T + b) U`` and the first column of ``x W^T + b``, the gate's logits.

    Args:
        x: tokens ``(B, N, C)``, contiguous.
        read_weight: W, ``(H, C)``: the gate's weights in row 0, the adapter's down-projection behind it.
        read_bias: b, ``(H,)``.
        write: U, ``(H, C)``: the adapter's up-projection; zeros in row 0.

    Returns:
        Logits ``(B, N)`` in fp32, and the new residual stream ``(B, N, C)``.
    """
    batch, count, width = x.shape
    hidden = len(read_weight)
    if hidden > _WIDEST:
        read = F.linear(x, read_weight, read_bias)
        written = torch.addmm(x.flatten(0, 1), F.relu(read).flatten(0, 1), write)
        return read[..., 0].contiguous().to(torch.float32), written.view_as(x)
    values = torch.empty(batch, count, dtype=torch.float32, device=x.device)
    out = torch.empty_like(x)
    _joint[(triton.cdiv(batch * count, _TOKENS),)](
        x,
        read_weight,
        read_bias,
        write,
        values,
        out,
        batch * count,
        width,
        hidden,
        BLOCK_TOKENS=_TOKENS,
        BLOCK_WIDTH=_block_width(x.dtype),
        BLOCK_HIDDEN=max(16, triton.next_power_of_2(hidden)),
        PRECISION=precision(x.dtype),
    )
    return values, out


def _block_width(dtype: torch.dtype) -> int:
    """Channels in a tile: fp32 is multiplied without tensor cores, out of registers."""
    return 32 if dtype is torch.float32 else 128


@triton.jit
def _joint(
    x,
    read_weight,
    read_bias,
    write,
    values,
    out,
    tokens,
    width,
    hidden,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    inside = token < tokens
    start = token.to(tl.int64)[:, None] * width
    unit = tl.arange(0, BLOCK_HIDDEN)
    known = unit < hidden
    read = tl.zeros((BLOCK_TOKENS, BLOCK_HIDDEN), tl.float32)
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        real = column < width
        features = tl.load(x + start + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        # Read transposed, so that the product needs no transposition of its own.
        weight = tl.load(
            read_weight + unit[None, :] * width + column[:, None], mask=known[None, :] & real[:, None], other=0.0
        )
        read = dot(features, weight, read, PRECISION)
    read += tl.load(read_bias + unit, mask=known, other=0.0).to(tl.float32)[None, :]
    tl.store(values + token, tl.sum(tl.where(unit[None, :] == 0, read, 0.0), axis=1), mask=inside)
    activated = tl.maximum(read, 0.0).to(x.dtype.element_ty)
    for first in range(0, width, BLOCK_WIDTH):
        column = first + tl.arange(0, BLOCK_WIDTH)
        real = column < width
        weight = tl.load(
            write + unit[:, None] * width + column[None, :], mask=known[:, None] & real[None, :], other=0.0
        )
        # The tokens were read a moment ago and come from the cache.
        features = tl.load(x + start + column[None, :], mask=inside[:, None] & real[None, :], other=0.0)
        result = dot(activated, weight, features.to(tl.float32), PRECISION).to(out.dtype.element_ty)
        tl.store(out + start + column[None, :], result, mask=inside[:, None] & real[None, :])
