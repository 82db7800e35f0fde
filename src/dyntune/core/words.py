"""Numbers as people read them: how many of something, counts, times and sizes of files."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """How many of something there are: ``1 image``, ``1,200 images``, ``2 classes``.

    Args:
        count: how many.
        noun: what one of them is called.
    """
    return f"{count:,} {noun if count == 1 else several(noun)}"


def several(noun: str) -> str:
    """What several of something are called: ``images``, ``classes``, ``batches``."""
    return f"{noun}{'es' if noun.endswith(('s', 'x', 'sh', 'tch')) else 's'}"


def millions(count: float) -> str:
    """A count of MACs or parameters in a unit that people read: k, M or G."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3f} {unit}" if unit == "G" else f"{count / size:.2f} {unit}"
    return f"{count:.0f}"


def duration(seconds: float) -> str:
    """A time in a unit that people read: s, min or h."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def kilobytes(size: int) -> str:
    """A file size in kB (1,000 bytes)."""
    return f"{size / 1000:,.0f} kB"
