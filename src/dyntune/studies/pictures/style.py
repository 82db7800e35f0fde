"""The look that all pictures share: colours, type sizes, and figures that need neither a display nor global state."""

from typing import Literal

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

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


def new_figure(width: float, height: float, layout: Literal["constrained"] | None = None) -> Figure:
    """An empty white figure of ``width`` x ``height`` inches; unlike pyplot's, nothing else holds on to it.

    Args:
        layout: ``"constrained"`` makes room for labels and legend; None leaves every artist where it is put.
    """
    figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure


def lighter(colour: str, share: float = 0.45) -> tuple[float, float, float]:
    """``colour`` blended with white; ``share`` of the result is white."""
    red, green, blue = (share + (1 - share) * channel for channel in to_rgb(colour))
    return red, green, blue


def percent(share: float, digits: int = 1) -> str:
    """A share between 0 and 1 in words, for instance ``48.2 %``."""
    return f"{100 * share:.{digits}f} %"
