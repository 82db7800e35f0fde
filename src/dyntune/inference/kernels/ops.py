"""The kernels as two PyTorch operators, which torch.compile and CUDA graphs take as they are."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from dyntune.core.errors import DyntuneError
from dyntune.inference.kernels.launch import unavailable

Products = Literal["triton", "grouped"]
"""Who multiplies: Dyntune's own kernel, or PyTorch's grouped product."""


@torch.library.custom_op("dyntune::joint", mutates_args=())
def joint(x: Tensor, read_weight: Tensor, read_bias: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    """The gate's logits ``(B, N)`` in fp32 and the tokens behind the adapter; see ``kernels.joint``."""
    with _on(x):
        from dyntune.inference.kernels import joint as kernel

        return kernel.joint(*(tensor.contiguous() for tensor in (x, read_weight, read_bias, write)))


@joint.register_fake
def _(x: Tensor, read_weight: Tensor, read_bias: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[:2], dtype=torch.float32), x.new_empty(x.shape)


@torch.library.custom_op("dyntune::add_mlp", mutates_args=("out",))
def add_mlp(
    out: Tensor,
    x: Tensor,
    gate: Tensor,
    prefix: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    activation: str,
    products: str,
) -> None:
    """Adds the MLP's update of the active tokens to ``out``; nothing is computed for the others.

    Args:
        out: the residual stream behind the unit so far, ``(B, N, C)``, contiguous; changed in place.
        x: the tokens that the MLP reads, ``(B, N, C)``.
        gate: of the patches, ``(B, P)``: active where above 0.5.
        prefix: leading tokens of every image, always active.
        norm_weight: of the LayerNorm before the MLP, ``(C,)``; as ``norm_bias`` and ``epsilon``. All weights and
            biases are contiguous, which ``execution.supports`` checks.
        first_weight: of the map to the hidden layer, ``(H, C)``, with ``first_bias``.
        second_weight: of the map back, ``(C, H)``, with ``second_bias``.
        activation: of the hidden layer, a name that ``MlpParts`` knows.
        products: who multiplies, of ``Products``.
    """
    with _on(x):
        from dyntune.inference.kernels import grouped, product
        from dyntune.inference.kernels.compaction import compact
        from dyntune.inference.kernels.gathering import gather_norm

        linear = grouped if products == "grouped" else product
        index, count = compact(gate, prefix)
        rows = gather_norm(x.contiguous().flatten(0, 1), index, count, norm_weight, norm_bias, epsilon)
        hidden = linear.activated(rows, count, first_weight, first_bias, activation)
        linear.scattered_(out.view(-1, out.shape[-1]), hidden, index, count, second_weight, second_bias)


@add_mlp.register_fake
def _(
    out: Tensor,
    x: Tensor,
    gate: Tensor,
    prefix: int,
    norm_weight: Tensor,
    norm_bias: Tensor,
    epsilon: float,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
    activation: str,
    products: str,
) -> None:
    return None


def _on(x: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's device the current one, on which Triton launches.

    Raises:
        DyntuneError: no kernel runs there.
    """
    reason = unavailable(x.device)
    if reason is not None:
        raise DyntuneError(f'{reason}. Or run the model with execution="compact".')
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()
