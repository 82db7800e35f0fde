"""The machine at its limit: what libraries say then, each in its own words, as one sentence with what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Container, Iterator
from pathlib import Path

from dyntune.core.errors import DyntuneError, MachineError, in_one_line

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FEW = (errno.EMFILE, errno.ENFILE)
_SHARED = Path("/dev/shm")
_NEAR = 2**20
"""Bytes that are left on a disk that counts as full."""
_WORDS = {
    "shared": re.compile(r"shared memory|\(shm\)|bus error|ancdata|/torch_\d+", re.IGNORECASE),
    "files": re.compile(r"too many open files", re.IGNORECASE),
    "memory": re.compile(
        r"can't allocate memory|out of memory|cannot allocate memory|bad_?alloc|killed by signal: killed", re.IGNORECASE
    ),
    "disk": re.compile(
        r"no space left|disk quota|file too large|(pytorch)?streamwriter failed|unexpected pos|write failed|"
        r"file write|os error (28|27|122)",
        re.IGNORECASE,
    ),
}
_ADVICE = {
    "--batch-size": (", a smaller --batch-size",),
    "--accumulate": (" (with --accumulate for the same steps)",),
    "--workers": (", fewer --workers", "--workers 0 (workers=0) or fewer, "),
    "--grad-checkpointing": (", --grad-checkpointing",),
}
"""What sentences say of an option; without it they are still sentences."""


@contextlib.contextmanager
def limits_named() -> Iterator[None]:
    """Raises MachineError in place of whatever says, somewhere in it, that the machine is at a limit."""
    try:
        yield
    except DyntuneError:
        raise
    except Exception as error:
        words = limit(error)
        if words is None:
            raise
        raise MachineError(words) from error


def limit(error: BaseException, folder: Path | None = None) -> str | None:
    """The sentence for an error that comes of a limit of the machine; None for any other.

    Args:
        error: it or what has caused it.
        folder: that was written to, if that is known.
    """
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        kind = _kind(error)
        if kind is not None:
            return _sentence(kind, error, folder)
        error = error.__cause__ or error.__context__  # type: ignore[assignment]
    # Some libraries say nothing of the reason.
    if folder is not None and _free(folder) < _NEAR:
        return _sentence("disk", seen[0], folder)
    return None


def advice_for(text: str, options: Container[str]) -> str:
    """A text without the advice to give options that a command does not have.

    Args:
        text: with a sentence of this module in it, or without.
        options: of the command. Where it has ``--readers``, those are the processes that read images.
    """
    for option, pieces in _ADVICE.items():
        for piece in pieces:
            if option not in options:
                text = text.replace(piece, "")
            elif option == "--workers" and "--readers" in options:
                text = text.replace(piece, piece.replace(option, "--readers"))
    return text


def _kind(error: BaseException) -> str | None:
    if isinstance(error, MemoryError):
        return "memory"
    if isinstance(error, OSError) and error.errno in _FULL:
        return "shared" if str(error.filename or "").startswith(str(_SHARED)) else "disk"
    if isinstance(error, OSError) and error.errno in _FEW:
        return "files"
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return "memory"
    if isinstance(error, OSError | RuntimeError) or "Error" in type(error).__name__:
        return next((kind for kind, words in _WORDS.items() if words.search(str(error))), None)
    return None


def _sentence(kind: str, error: BaseException, folder: Path | None) -> str:
    if kind == "shared":
        return (
            f"the processes that read images ran out of shared memory ({_megabytes(_SHARED)} free in {_SHARED}). Give "
            "--workers 0 (workers=0) or fewer, smaller batches, or more of it: docker run --shm-size=2g."
        )
    if kind == "files":
        return "too many files are open in this process. What helps: ulimit -n 4096, fewer --workers."
    if kind == "memory":
        return (
            f"the memory does not suffice: {in_one_line(error)}. What takes less: a smaller model, a smaller "
            "--batch-size (with --accumulate for the same steps), fewer --workers, --grad-checkpointing."
        )
    name = getattr(error, "filename", None)
    place = folder or (Path(os.fsdecode(name)).parent if isinstance(name, str | bytes) else None)
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return f"a file in {place or 'the folder'} is larger than may be written (ulimit -f). What was there stays."
    where = f"on the disk in {place} ({_megabytes(place)} free)" if place else "where it was written, or printed, to"
    return f"there is no room left {where}. What was there before stays; make room and start again."


def _free(folder: Path) -> int:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 2**63


def _megabytes(folder: Path) -> str:
    return f"{_free(folder) / 1e6:,.0f} MB"
