"""Writes a figure to a file whose suffix names the format."""

from pathlib import Path

from matplotlib.figure import Figure

from dyntune.core.errors import DyntuneError
from dyntune.core.files import write_atomically
from dyntune.studies.pictures.style import DPI

# In SVG and PDF the resolution only applies to photographs, which stand enlarging better when there is more of them.
_RESOLUTION = {".png": DPI, ".svg": 2 * DPI, ".pdf": 2 * DPI}


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes ``figure`` as PNG (150 dpi), SVG or PDF; ``path`` holds the old file or the whole new one, never a part.

    Args:
        figure: for instance from :func:`~dyntune.studies.pictures.activation_figure`.
        path: ends in ``.png``, ``.svg`` or ``.pdf``; without a suffix, ``.png`` is added. Missing folders are made.

    Returns:
        The path of the file.

    Raises:
        DyntuneError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    if not path.suffix:
        path = path.with_suffix(".png")
    suffix = path.suffix.lower()
    if suffix not in _RESOLUTION:
        raise DyntuneError(f"cannot write a picture to {path}: expected a name ending in {', '.join(_RESOLUTION)}.")
    try:
        write_atomically(path, lambda file: figure.savefig(file, format=suffix[1:], dpi=_RESOLUTION[suffix]))
    except OSError as error:
        raise DyntuneError(f"cannot write {path}: {error.strerror or error}. Choose another folder.") from error
    return path
