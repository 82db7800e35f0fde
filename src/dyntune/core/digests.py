"""Digests of what is in memory: tensors, and the plain values around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def sample(tensor: Tensor) -> Tensor:
    """At most 64 values of a tensor, evenly spread, ``(values,)``: training changes some of them for certain."""
    flat = tensor.detach().reshape(-1)
    last = max(len(flat) - 1, 0)
    # In fp32 the end of a large tensor may be rounded to a place behind it.
    return flat[torch.linspace(0, last, min(64, len(flat))).long().clamp_max(last).to(flat.device)]


_WHOLE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(tensor: Tensor) -> int:
    """A number that changes with any one value of a tensor: the sum of its bits, read as whole numbers."""
    flat = tensor.detach().contiguous().reshape(-1)
    return int(flat.view(_WHOLE.get(tensor.element_size(), torch.int64)).sum(dtype=torch.int64))


def values_digest(values: Any) -> str:
    """SHA-256 of numbers, texts, tensors, and of lists and mappings of such, nested in any way.

    Raises:
        TypeError: there is something else among them.
    """
    digest = hashlib.sha256()
    for piece in _pieces(values):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(value: Any) -> Iterable[bytes | memoryview]:
    if isinstance(value, Tensor):
        held = value.detach().cpu().contiguous()
        yield f"tensor {held.dtype} {tuple(held.shape)}\n".encode()
        yield held.reshape(-1).view(torch.uint8).numpy().data
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}\n".encode()
        for key, item in value.items():
            yield from _pieces(key)
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}\n".encode()
        for item in value:
            yield from _pieces(item)
    elif value is None or isinstance(value, bool | int | float | str):
        text = f"{type(value).__name__} {value!r}\n"
        yield text.encode("utf-8", "surrogatepass")
    else:
        raise TypeError(f"a {type(value).__name__} has no digest")
