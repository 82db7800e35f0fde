"""A figure measured in pixels from the top left, on which pictures, heat maps and texts are put."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from dyntune.visualize.style import DPI, FAINT, INK, SMALL_SIZE, new_figure

VEIL = (0.78, 0.85, 0.93)
"""RGB that skipped patches are blended with: light, but neither white nor a neutral grey, as active patches may be."""
VEIL_SHARE = 0.8
"""Share of that colour in a skipped patch."""
_FINEST_RULED_PATCH = 5
_BAR_WIDTH = 14


@dataclass(frozen=True)
class Box:
    """A rectangle on the page."""

    left: float
    top: float
    width: float
    height: float

    @property
    def bottom(self) -> float:
        return self.top + self.height

    @property
    def centre(self) -> float:
        """Half-way between left and right."""
        return self.left + self.width / 2

    @property
    def extent(self) -> tuple[float, float, float, float]:
        """Left, right, bottom, top, as matplotlib asks for."""
        return self.left, self.left + self.width, self.bottom, self.top


class Page:
    """One axes over the whole figure: a hundred panels as a hundred axes would take seconds to set up.

    Args:
        width: in pixels, at 150 per inch.
        height: in pixels.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = new_figure(width / DPI, height / DPI)
        # Each panel stays a picture of its own in SVG and PDF files, at its own resolution.
        self.figure.suppressComposite = True
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set_xlim(0, width)
        self.axes.set_ylim(height, 0)
        self.axes.set_autoscale_on(False)
        self.axes.axis("off")
        self.scale = Normalize(0, 1)
        self.colours = ScalarMappable(self.scale, colormaps["viridis"])

    def picture(self, pixels: np.ndarray, box: Box, gid: str, active: np.ndarray | None = None) -> None:
        """Stretches an RGB image ``(height, width, 3)`` to ``box``, and veils what is not ``active``.

        Args:
            active: Boolean ``(rows, columns)`` of patches; None veils nothing.
            gid: names the picture, in the figure and in SVG files.
        """
        enlarged = pixels.shape[0] <= box.height and pixels.shape[1] <= box.width
        interpolation = "nearest" if enlarged else "antialiased"
        self.axes.imshow(pixels, extent=box.extent, aspect="auto", interpolation=interpolation, gid=gid)
        if active is not None and not active.all():
            # A picture of its own, one pixel per patch, so that patches have sharp edges at every resolution.
            veil = np.empty((*active.shape, 4))
            veil[..., :3] = VEIL
            veil[..., 3] = np.where(active, 0, VEIL_SHARE)
            self.axes.imshow(veil, extent=box.extent, aspect="auto", interpolation="nearest", gid=f"{gid} skipped")
        self._border(box)

    def heat(self, counts: np.ndarray, box: Box, most: int, gid: str) -> None:
        """Draws ``(rows, columns)`` counts as colours on a scale from 0 to ``most``."""
        self.scale.vmax = most
        colours = self.colours.cmap
        self.axes.imshow(
            counts, colours, self.scale, extent=box.extent, aspect="auto", interpolation="nearest", gid=gid
        )
        self._border(box)

    def patch_lines(self, box: Box, grid: tuple[int, int]) -> None:
        """Thin lines between the patches, unless they would cover the picture."""
        if box.width / grid[1] < _FINEST_RULED_PATCH:
            return
        ys = np.linspace(box.top, box.bottom, grid[0] + 1)[1:-1]
        xs = np.linspace(box.left, box.left + box.width, grid[1] + 1)[1:-1]
        across = [((box.left, y), (box.left + box.width, y)) for y in ys]
        down = [((x, box.top), (x, box.bottom)) for x in xs]
        self.axes.add_collection(LineCollection(across + down, colors="0.6", linewidths=0.25, alpha=0.6))

    def text(
        self,
        words: str,
        x: float,
        y: float,
        size: float,
        colour: str = INK,
        *,
        rotation: float = 0,
        align: Literal["center", "left"] = "center",
    ) -> None:
        """Words around ``(x, y)``, never read as mathematics, whatever signs a class name has."""
        written = self.axes.text(x, y, words, fontsize=size, color=colour, rotation=rotation, parse_math=False)
        written.set(horizontalalignment=align, verticalalignment="center_baseline", rotation_mode="anchor")

    def colour_bar(self, left: float, top: float, height: float) -> None:
        """The scale of all heat maps."""
        place = (left / self.width, 1 - (top + height) / self.height, _BAR_WIDTH / self.width, height / self.height)
        bar = self.figure.colorbar(self.colours, cax=self.figure.add_axes(place))
        bar.locator = MaxNLocator(nbins=max(2, min(6, int(height / 30))), integer=True)
        bar.update_ticks()
        bar.ax.tick_params(labelsize=SMALL_SIZE, length=2, width=0.5, color=FAINT, labelcolor=INK)
        bar.outline.set_visible(False)
        bar.set_label("blocks", fontsize=SMALL_SIZE, color=INK)

    def _border(self, box: Box) -> None:
        corner = (box.left, box.top)
        self.axes.add_patch(Rectangle(corner, box.width, box.height, fill=False, edgecolor="0.6", linewidth=0.4))
