"""Triton kernel: the active tokens, normalised, one after the other in one matrix."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_ELEMENTS = 4096


def gather_norm(x: Tensor, index: Tensor, count: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """LayerNorm of the active tokens.

    Args:
        x: tokens ``(T, C)``, contiguous.
        index: ``(T,)`` int32, the active ones first.
        count: ``(1,)`` int32, how many of them; read on the device.
        weight: of the norm, ``(C,)``.
        bias: of the norm, ``(C,)``.
        epsilon: of the norm.

    Returns:
        ``(T, C)``; rows from ``count`` on are not set.
    """
    tokens, width = x.shape
    out = torch.empty_like(x)
    block_width = triton.next_power_of_2(width)
    block_rows = max(1, _ELEMENTS // block_width)
    _gather_norm[(triton.cdiv(tokens, block_rows),)](
        x, index, count, weight, bias, out, width, epsilon, BLOCK_ROWS=block_rows, BLOCK_WIDTH=block_width
    )
    return out


@triton.jit
def _gather_norm(
    x, index, count, weight, bias, out, width, epsilon, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr
):
    total = tl.load(count)
    if tl.program_id(0) * BLOCK_ROWS < total:
        row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tl.arange(0, BLOCK_WIDTH)
        real = column < width
        inside = (row < total)[:, None] & real[None, :]
        token = tl.load(index + row, mask=row < total, other=0).to(tl.int64)
        features = tl.load(x + token[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)
        mean = tl.sum(features, axis=1) / width
        centred = tl.where(real[None, :], features - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / width
        normed = centred * tl.rsqrt(variance + epsilon)[:, None]
        scale = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)
        shift = tl.load(bias + column, mask=real, other=0.0).to(tl.float32)
        result = (normed * scale[None, :] + shift[None, :]).to(out.dtype.element_ty)
        tl.store(out + row.to(tl.int64)[:, None] * width + column[None, :], result, mask=inside)
