"""What the kernels compute with inside a tile: products of matrices and activations, both in fp32."""

import torch
import triton
import triton.language as tl

from dyntune.inference.kernels.launch import interpreted


def precision(dtype: torch.dtype) -> str:
    """How ``dot`` multiplies matrices of ``dtype``: fp32 in full, as PyTorch does unless told otherwise."""
    if interpreted() and dtype is torch.bfloat16:
        return "widened"  # the interpreter multiplies the bits of bf16 as if they were integers
    return "ieee" if dtype is torch.float32 else "tf32"


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``, summed in fp32."""
    if PRECISION == "widened":
        total = tl.dot(left.to(tl.float32), right.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(left, right, total, input_precision=PRECISION)
    return total


@triton.jit
def activate(x, NAME: tl.constexpr):
    """``x`` in fp32 behind the activation that ``MlpParts.nonlinearity`` calls NAME."""
    if NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        # The tanh form of GELU is a sigmoid of twice its argument.
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        tl.static_assert(NAME == "quick_gelu")
        x = x * tl.sigmoid(1.702 * x)
    return x
