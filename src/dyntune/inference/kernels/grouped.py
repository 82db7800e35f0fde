"""PyTorch's grouped product with a single group, which ends where a count on the device says."""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from dyntune.inference.kernels.arithmetic import activate
from dyntune.inference.kernels.launch import capability

_BLOCK = 1024


def refusal(device: torch.device, dtype: torch.dtype, *widths: int) -> str | None:
    """Why the grouped product is not to be used here; None if it is.

    On other GPUs than these PyTorch computes it group by group and asks the device for the counts.

    Args:
        device: of the matrices.
        dtype: of the matrices.
        widths: rows and columns of the weights.
    """
    if not (hasattr(F, "grouped_mm") or hasattr(torch, "_grouped_mm")):
        return f"torch {torch.__version__} has no grouped product"
    if dtype is not torch.bfloat16:
        return f"the grouped product takes bf16; given {dtype}"
    if any(width % 8 for width in widths):
        return f"the grouped product takes widths that are multiples of 8; given {' and '.join(map(str, widths))}"
    if device.type == "cuda" and capability(device)[0] not in (9, 10):
        return "the grouped product is fast on NVIDIA's GPUs of compute capability 9.0 and 10.0 only"
    if device.type == "cpu" and not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has a grouped product for GPUs alone"
    return None


def activated(rows: Tensor, count: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """As ``dyntune.inference.kernels.product.activated``."""
    out = _grouped(rows, count, weight)
    grid = (len(out), triton.cdiv(out.shape[1], _BLOCK))
    _activate[grid](out, bias, count, out.shape[1], ACTIVATION=activation, BLOCK=_BLOCK)
    return out


def scattered_(out: Tensor, rows: Tensor, index: Tensor, count: Tensor, weight: Tensor, bias: Tensor) -> None:
    """As ``dyntune.inference.kernels.product.scattered_``."""
    update = _grouped(rows, count, weight)
    grid = (len(out), triton.cdiv(out.shape[1], _BLOCK))
    _scatter[grid](out, update, bias, index, count, out.shape[1], BLOCK=_BLOCK)


def _grouped(rows: Tensor, count: Tensor, weight: Tensor) -> Tensor:
    # torch 2.8 has it under its private name only.
    product: Any = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return product(rows, weight.t().unsqueeze(0), offs=count)


@triton.jit
def _activate(x, bias, count, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(count):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        place = x + row.to(tl.int64) * width + column
        value = tl.load(place, mask=column < width, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        tl.store(place, activate(value, ACTIVATION).to(x.dtype.element_ty), mask=column < width)


@triton.jit
def _scatter(out, update, bias, index, count, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < tl.load(count):
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(update + row.to(tl.int64) * width + column, mask=column < width, other=0.0).to(tl.float32)
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
        place = out + tl.load(index + row).to(tl.int64) * width + column
        value += tl.load(place, mask=column < width, other=0.0).to(tl.float32)
        tl.store(place, value.to(out.dtype.element_ty), mask=column < width)
