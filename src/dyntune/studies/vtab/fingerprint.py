"""Short digests that tell one task's lists, and one weight file, from another; where a file lies does not count."""

from __future__ import annotations

import hashlib
from pathlib import Path

from dyntune.data.vtab import LISTS

_PIECES, _PIECE = 64, 1 << 16
_DIGITS = 12


def lists_digest(folder: Path) -> str:
    """Of a task's four lists: names of images and labels. The images themselves are not read."""
    digest = hashlib.sha256()
    for name in LISTS:
        content = (folder / f"{name}.txt").read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:_DIGITS]


def file_digest(file: Path) -> str:
    """Size, and a digest of 64 pieces of 64 KiB from the first byte to the last; of all bytes up to 4 MiB.

    The end of ``.npz`` and ``.pth`` files holds checksums of everything in them.
    """
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        for index in range(_PIECES):
            # Above 4 MiB pieces have gaps between them, below they overlap.
            opened.seek(max(0, size - _PIECE) * index // (_PIECES - 1))
            digest.update(opened.read(_PIECE))
    return f"{size} bytes, digest {digest.hexdigest()[:_DIGITS]}"
