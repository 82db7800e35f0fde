"""Triton kernel: a linear map of the active tokens alone, whose number it reads on the device."""

import threading
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dyntune.inference.kernels.arithmetic import activate, dot, precision
from dyntune.inference.kernels.launch import describable, interpreted

_MANY = 4096
"""Tokens from which on large tiles are tried; below, small ones, so that there is work for every multiprocessor."""
_LAUNCHING = threading.Lock()
"""Triton's autotuner keeps the arguments of a launch, and the copies that a tuning restores, on the kernel itself."""


def activated(
    rows: Tensor, count: Tensor, weight: Tensor, bias: Tensor, activation: str, *, descriptors: bool | None = None
) -> Tensor:
    """``act(rows W^T + b)`` of the first ``count`` rows.

    Args:
        rows: ``(T, C)``, contiguous.
        count: ``(1,)`` int32, rows to compute; read on the device.
        weight: W, ``(H, C)``, contiguous.
        bias: b, ``(H,)``.
        activation: name of the activation.
        descriptors: whether tiles are fetched through tensor descriptors; by default wherever that is possible.

    Returns:
        ``(T, H)``; rows from ``count`` on hold nothing of meaning.
    """
    out = torch.empty(len(rows), len(weight), dtype=rows.dtype, device=rows.device)
    described = describable(rows, weight) if descriptors is None else descriptors
    _launch(_storing, rows, count, weight, bias, out, rows, activation, described)
    return out


def scattered_(
    out: Tensor,
    rows: Tensor,
    index: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    descriptors: bool | None = None,
) -> None:
    """Adds ``rows W^T + b`` of the first ``count`` rows to those rows of ``out`` that they belong to.

    Args:
        out: ``(T, C)``, contiguous; changed in place.
        rows: ``(T, H)``, contiguous.
        index: ``(T,)`` int32; row i belongs to row ``index[i]`` of ``out``, no two to the same one.
        count: ``(1,)`` int32, rows to compute; read on the device.
        weight: W, ``(C, H)``, contiguous.
        bias: b, ``(C,)``.
        descriptors: whether tiles are fetched through tensor descriptors; by default wherever that is possible.
    """
    described = describable(rows, weight) if descriptors is None else descriptors
    _launch(_adding, rows, count, weight, bias, out, index, "", described)


def _launch(
    kernel: Any,
    rows: Tensor,
    count: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    index: Tensor,
    activation: str,
    described: bool,
) -> None:
    total, depth = rows.shape
    columns = len(weight)
    scatters = not activation

    def grid(meta: dict[str, Any]) -> tuple[int]:
        tiles = triton.cdiv(total, meta["BLOCK_ROWS"]) * triton.cdiv(columns, meta["BLOCK_COLUMNS"])
        return (min(tiles, meta["PER_PROCESSOR"] * _processors(rows.device)) if meta["PER_PROCESSOR"] else tiles,)

    def tiles(matrix: Tensor) -> Any:
        # The tile's shape is set by the configuration that runs.
        return TensorDescriptor.from_tensor(matrix, [16, 16]) if described else matrix

    with _LAUNCHING:
        kernel[grid](
            tiles(rows),
            tiles(weight),
            bias,
            out,
            index,
            count,
            COLUMNS=columns,
            DEPTH=depth,
            size=triton.next_power_of_2(total),
            DESCRIBED=described,
            SCATTERS=scatters,
            ACTIVATION=activation,
            PRECISION=precision(rows.dtype),
        )


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _set_tiles(arguments: dict[str, Any]) -> None:
    """Gives the tensor descriptors the tiles of the configuration that is about to run."""
    rows, columns, depth = (arguments[f"BLOCK_{name}"] for name in ("ROWS", "COLUMNS", "DEPTH"))
    for name, shape in (("rows", [rows, depth]), ("weight", [columns, depth])):
        if isinstance(arguments[name], TensorDescriptor):
            arguments[name].block_shape = shape


def _config(rows: int, columns: int, depth: int, warps: int, stages: int, per_processor: int) -> triton.Config:
    """A tile, and how many programs each multiprocessor gets that loop over tiles; 0 for a program per tile."""
    meta = {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_DEPTH": depth, "PER_PROCESSOR": per_processor}
    return triton.Config(meta, num_warps=warps, num_stages=stages, pre_hook=_set_tiles)


_LARGE = [
    _config(128, 256, 64, 8, 3, 1),
    _config(128, 256, 64, 8, 4, 1),
    _config(128, 256, 64, 8, 3, 0),
    _config(256, 128, 64, 8, 3, 1),
    _config(128, 128, 64, 8, 3, 0),
    _config(128, 128, 64, 4, 3, 2),
]
_SMALL = [
    _config(64, 128, 64, 4, 4, 0),
    _config(64, 64, 64, 4, 4, 0),
    _config(32, 64, 128, 4, 4, 0),
    _config(16, 64, 128, 4, 4, 0),
]
_FULL_PRECISION = [_config(64, 64, 32, 4, 2, 0)]
# Small tiles, so that a small matrix has several in each direction; and a single program, which must loop.
_INTERPRETED = [_config(16, 32, 16, 4, 1, 1)]


def _fitting(configs: list[triton.Config], arguments: dict[str, Any], **given: Any) -> list[triton.Config]:
    """The configurations worth a try for these arguments."""
    if len(configs) == 1:
        return configs
    if given["PRECISION"] == "ieee":
        return _FULL_PRECISION
    return _LARGE if given["size"] >= _MANY else _SMALL


def _autotuned(kernel: Any, restore: list[str] | None) -> Any:
    configs = _INTERPRETED if interpreted() else [*_LARGE, *_SMALL, *_FULL_PRECISION]
    return triton.autotune(
        configs,
        ["COLUMNS", "DEPTH", "DESCRIBED", "size"],
        prune_configs_by={"early_config_prune": _fitting},
        restore_value=restore,
    )(kernel)


# The size is not computed with: what runs fastest is found anew for each power of two of tokens.
@triton.jit
def _product(
    rows,
    weight,
    bias,
    out,
    index,
    count,
    size,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SCATTERS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    PER_PROCESSOR: tl.constexpr,
):
    total = tl.load(count)
    row_tiles = tl.cdiv(total, BLOCK_ROWS)
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    # Neighbouring programs share rows and weights: all columns of GROUP row tiles come before the next row tiles.
    GROUP: tl.constexpr = 8
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=PER_PROCESSOR > 0):
        group = tile // (GROUP * column_tiles)
        height = tl.minimum(row_tiles - group * GROUP, GROUP)
        within = tile % (GROUP * column_tiles)
        first_row = (group * GROUP + within % height) * BLOCK_ROWS
        first_column = (within // height) * BLOCK_COLUMNS
        row = first_row + tl.arange(0, BLOCK_ROWS)
        column = first_column + tl.arange(0, BLOCK_COLUMNS)
        inside = row < total
        real = column < COLUMNS
        result = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        for first in range(0, DEPTH, BLOCK_DEPTH):
            if DESCRIBED:
                left = rows.load([first_row, first])
                right = weight.load([first_column, first])
            else:
                depth = first + tl.arange(0, BLOCK_DEPTH)
                left = tl.load(
                    rows + row.to(tl.int64)[:, None] * DEPTH + depth[None, :],
                    mask=inside[:, None] & (depth < DEPTH)[None, :],
                    other=0.0,
                )
                right = tl.load(
                    weight + column[:, None] * DEPTH + depth[None, :],
                    mask=real[:, None] & (depth < DEPTH)[None, :],
                    other=0.0,
                )
            result = dot(left, right.T, result, PRECISION)
        result += tl.load(bias + column, mask=real, other=0.0).to(tl.float32)[None, :]
        if SCATTERS:
            target = tl.load(index + row, mask=inside, other=0).to(tl.int64)
            place = out + target[:, None] * COLUMNS + column[None, :]
            result += tl.load(place, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)
            tl.store(place, result.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])
        else:
            result = activate(result, ACTIVATION)
            place = out + row.to(tl.int64)[:, None] * COLUMNS + column[None, :]
            tl.store(place, result.to(out.dtype.element_ty), mask=inside[:, None] & real[None, :])


_storing = _autotuned(_product, None)
_adding = _autotuned(_product, ["out"])
