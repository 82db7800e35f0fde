"""Linear maps whose weights lie in memory as oneDNN's products read them, on CPUs where that is faster."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyntune.core.errors import DyntuneError
from dyntune.core.timing import best_of_few

_NOT_SAVED = (
    "an optimised model cannot be saved, for its weights are packed. Save the one that it was made from, "
    "model.save(FOLDER); after load, optimize it again."
)


class PackedLinear(nn.Module):
    """``x W^T + b`` in fp32 with W in oneDNN's own layout, on a CPU, without gradients. It cannot be copied or saved.

    The operators are those that ``torch.compile`` uses for frozen weights.

    Args:
        linear: its weights are copied.
        dtype: of the product; its result is fp32 again.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype))
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().to(dtype))

    def __deepcopy__(self, memo: object) -> PackedLinear:
        raise DyntuneError("an optimised model cannot be copied, for its weights are packed; optimize the model again.")

    def _save_to_state_dict(self, destination: object, prefix: str, keep_vars: bool) -> None:
        raise DyntuneError(_NOT_SAVED)

    def __reduce_ex__(self, protocol: object) -> str:
        raise DyntuneError(_NOT_SAVED)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.packed.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "").float()


def pack(maps: Sequence[tuple[nn.Module, str]], rows: int, halved: Sequence[tuple[nn.Module, str]] = ()) -> str:
    """Replaces linear maps that every token goes through, in place, if that makes the largest of them faster here.

    Args:
        maps: modules that hold one, in fp32, and its name in each of them.
        rows: tokens of an image.
        halved: those among them whose products are computed in bf16, whether that is faster or not.

    Returns:
        What was done, or why not, for people.

    Raises:
        DyntuneError: bf16 is asked for, and this CPU does not compute in it.
    """
    linears = [(holder, name, cast(nn.Linear, getattr(holder, name))) for holder, name in maps]
    half = {getattr(holder, name) for holder, name in halved}
    largest = max((linear for *_, linear in linears), key=lambda linear: linear.weight.numel(), default=None)
    if largest is None or largest.weight.device.type != "cpu" or largest.weight.dtype is not torch.float32:
        usable = False
    else:
        usable = available()
    if halved and not (usable and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        raise DyntuneError(
            "precision bf16 needs an fp32 model on a CPU that multiplies in bf16 (AVX512_BF16 or AMX), which this one "
            "does not; without it products in bf16 are many times slower than in fp32. Use precision='fp32'."
        )
    if largest is None or not usable:
        return "weights are not packed: that is for fp32 on a CPU with oneDNN"
    ratio = _speedup(largest, rows, torch.bfloat16 if largest in half else torch.float32)
    if ratio < 1 and not halved:
        return f"weights are not packed: oneDNN's product took {1 / ratio:.2f} x the time of the plain one here"
    for holder, name, linear in linears:
        setattr(holder, name, PackedLinear(linear, torch.bfloat16 if linear in half else torch.float32))
    kinds = f", {len(half)} of them in bf16" if half else ""
    return f"{len(linears)} linear maps have packed weights{kinds}; the largest is {ratio:.2f} x as fast here"


def available() -> bool:
    """Whether this PyTorch has oneDNN and its operators for packed weights."""
    ops = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, op) for op in ops)


@torch.inference_mode()
def _speedup(linear: nn.Linear, rows: int, dtype: torch.dtype) -> float:
    """How many times as fast the packed product of ``rows`` tokens is; the best of a few runs of each, in turns."""
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(0))
    plain = partial(F.linear, weight=linear.weight, bias=linear.bias)
    best = best_of_few({"plain": plain, "packed": PackedLinear(linear, dtype)}, x)
    return best["plain"] / best["packed"]
