"""Digests: of tensors and the plain values around them, and of files of weights."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
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
_ODD = 0x1E3779B97F4A7C15
"""So that weights differ in all of their bits; sums are those of 64 bits."""


def checksum(tensor: Tensor) -> int:
    """A number that changes with any one value of a tensor, and where values change places.

    The bits, read as whole numbers, are laid out as a square; sums of its rows and columns are added with weights.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    bits = flat.view(_WHOLE.get(tensor.element_size(), torch.int64))
    width = max(math.isqrt(len(bits)), 1)
    square, rest = bits[: len(bits) // width * width].view(-1, width), bits[len(bits) // width * width :]
    total = 0
    for number, sums in enumerate((square.sum(1), square.sum(0), rest.long())):
        weights = torch.arange(1, len(sums) + 1, device=sums.device) * _ODD * (2 * number + 1)
        total += int((sums * weights).sum())
    return total % 2**64


_PIECES, _PIECE = 64, 1 << 16
_LOADED = (".safetensors", ".bin", ".npz", ".pth", ".json")
DIGITS = 12
"""Of digests that people see."""


def pieces_digest(path: Path) -> str:
    """Size, and a digest of 64 pieces of 64 KiB from the first byte to the last; of all bytes up to 4 MiB.

    The end of ``.npz`` and ``.pth`` files holds checksums of everything in them. Of a folder, of what loads from it:
    files of weights and of configurations.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _LOADED) if path.is_dir() else [path]
    digest, total = hashlib.sha256(), 0
    for file in files:
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
        size = file.stat().st_size
        total += size
        with file.open("rb") as opened:
            for index in range(_PIECES):
                # Above 4 MiB pieces have gaps between them, below they overlap.
                opened.seek(max(0, size - _PIECE) * index // (_PIECES - 1))
                digest.update(opened.read(_PIECE))
    return f"{total} bytes, digest {digest.hexdigest()[:DIGITS]}"


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
