"""The look that all pictures share, colours, type sizes, axes and legends, and how pictures are written to files."""

from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from dyntune.core.errors import DyntuneError
from dyntune.core.files import write_atomically

DPI = 150
"""Pixels per inch that figures are laid out for, and that PNG files are written with."""

# Okabe and Ito's palette without black and without its yellow, which is too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
MARKERS = ("o", "s", "^", "D", "v", "P")

INK = "#222222"
FAINT = "#5F5F5F"
RULE = "#DDDDDD"

TITLE_SIZE = 7.5
"""Type sizes are in points."""
TEXT_SIZE = 8.0
SMALL_SIZE = 6.5
LONGEST_IN_TWO_COLUMNS = 42
"""Characters of a legend entry, in a figure of usual width."""
LEGEND_LINE = 0.17
"""Height of a line of the legend, in inches."""

# In SVG and PDF the resolution only applies to photographs, which stand enlarging better when there is more of them.
_RESOLUTION = {".png": DPI, ".svg": 2 * DPI, ".pdf": 2 * DPI}


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty white figure of ``width`` x ``height`` inches; unlike pyplot's, nothing else holds on to it.

    Args:
        layout: ``"constrained"`` makes room for labels and legend; None leaves every artist where it is put.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def frame(axes: Axes, x: str = "", y: str = "", *, grid: Literal["both", "y"] = "both") -> None:
    """Names the axes and draws what stands around a plot: faint ticks, a grid behind everything, no box.

    Args:
        axes: whose limits are left as they are.
        x: name of the horizontal axis; empty for none.
        y: name of the vertical axis; empty for none.
        grid: whether there are vertical lines too.
    """
    if x:
        axes.set_xlabel(x, color=INK, fontsize=TEXT_SIZE)
    if y:
        axes.set_ylabel(y, color=INK, fontsize=TEXT_SIZE)
    axes.tick_params(colors=FAINT, labelsize=TEXT_SIZE)
    axes.grid(axis=grid, color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(figure: Figure, place: str, columns: int) -> None:
    """A legend outside the plots, whose entries are never read as mathematics, whatever signs a spec has."""
    drawn = figure.legend(loc=place, ncols=columns, frameon=False, fontsize=TEXT_SIZE)
    for text in drawn.get_texts():
        text.set_parse_math(False)


def lighter(colour: str, share: float = 0.45) -> tuple[float, float, float]:
    """``colour`` blended with white; ``share`` of the result is white."""
    red, green, blue = (share + (1 - share) * channel for channel in to_rgb(colour))
    return red, green, blue


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 in words, for instance ``48.2 %``."""
    return f"{100 * share:.{digits}f} %"


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
