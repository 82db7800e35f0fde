"""Triton kernel: which tokens of the batch are active, as a list on the device, in their order."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def compact(values: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """Positions of the active tokens in the flattened batch, without asking the device how many there are.

    Args:
        values: the gate of the patches, ``(B, P)``: active where above 0.5.
        prefix: leading tokens of every image, always active, so that an image has N = prefix + P.

    Returns:
        ``(B * N,)`` int32, of which the first ``count`` are set, in ascending order; and that count, ``(1,)`` int32.
    """
    batch, patches = values.shape
    tokens = batch * (prefix + patches)
    index = torch.empty(tokens, dtype=torch.int32, device=values.device)
    count = torch.empty(1, dtype=torch.int32, device=values.device)
    _compact[(triton.cdiv(tokens, _BLOCK),)](
        values, index, count, tokens, prefix + patches, prefix, *values.stride(), BLOCK=_BLOCK
    )
    return index, count


@triton.jit
def _active(values, token, tokens, per_image, prefix, image_stride, patch_stride):
    place = token % per_image
    always = place < prefix
    gate = tl.load(
        values + (token // per_image) * image_stride + (place - prefix) * patch_stride,
        mask=(token < tokens) & (place >= prefix),
        other=0.0,
    )
    return ((token < tokens) & (always | (gate > 0.5))).to(tl.int32)


@triton.jit
def _compact(values, index, count, tokens, per_image, prefix, image_stride, patch_stride, BLOCK: tl.constexpr):
    # Every program counts for itself what stands before its block: one launch, and no order between programs.
    first = tl.program_id(0) * BLOCK
    before = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, first, BLOCK):
        before += _active(values, start + tl.arange(0, BLOCK), tokens, per_image, prefix, image_stride, patch_stride)
    base = tl.sum(before)
    token = first + tl.arange(0, BLOCK)
    active = _active(values, token, tokens, per_image, prefix, image_stride, patch_stride)
    tl.store(index + base + tl.cumsum(active) - active, token, mask=active > 0)
    if first + BLOCK >= tokens:
        tl.store(count, base + tl.sum(active))
