"""A figure measured in pixels from the top left: pictures, heat maps and texts on it, and where its panels go."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike
from PIL import Image

from dyntune.core.texts import printable
from dyntune.core.words import counted
from dyntune.studies.pictures.style import DPI, FAINT, INK, SMALL_SIZE, new_figure

LINE = 20
"""Height of a line of small type, in pixels."""
VEIL = (0.78, 0.85, 0.93)
"""RGB that skipped patches are blended with: light, but neither white nor a neutral grey, as active patches may be."""
VEIL_SHARE = 0.8
"""Share of that colour in a skipped patch."""
GONE = (0.16, 0.16, 0.16)
"""RGB of dropped patches, under their hatching."""
_FINEST_RULED_PATCH = 5
_FINEST = 4
"""Pixels of a picture for each pixel of its panel that are kept: more are not seen, not even enlarged."""
_BAR_WIDTH = 14
_CHARACTER = 7.8
"""Pixels that one character of small type takes, about."""
_WIDE = 1600
_MARGIN = 14
_GAP = 6
_STRIP = 26
_BAR = 14
_BAR_TEXT = 64
_MOST_CAPTION_LINES = 3

_Line = tuple[tuple[int, int], tuple[int, int]]


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

    def picture(self, pixels: np.ndarray, box: Box, gid: str) -> None:
        """Stretches an RGB image ``(height, width, 3)`` to ``box``.

        Args:
            gid: names the picture, in the figure and in SVG files.
        """
        pixels = _shrunk(pixels, box)
        enlarged = pixels.shape[0] <= box.height and pixels.shape[1] <= box.width
        interpolation = "nearest" if enlarged else "antialiased"
        self.axes.imshow(pixels, extent=box.extent, aspect="auto", interpolation=interpolation, gid=gid)
        self._border(box)

    def photograph(self, pixels: np.ndarray, box: Box, grid: tuple[int, int], caption: Sequence[str], gid: str) -> None:
        """An RGB image with its patches ruled, and its caption under it."""
        self.picture(pixels, box, gid)
        self._rule(box, grid)
        self.lines(caption, box.centre, box.bottom)

    def paint(self, patches: np.ndarray, colours: ArrayLike, share: float, box: Box, gid: str) -> None:
        """Blends ``patches``, Boolean ``(rows, columns)``, with colours; draws nothing where there is none.

        Args:
            colours: RGB between 0 and 1, one for all patches or ``(rows, columns, 3)``.
            share: of these colours in the result.
        """
        if patches.any():
            # A picture of its own, one pixel per patch, so that patches have sharp edges at every resolution.
            layer = np.empty((*patches.shape, 4))
            layer[..., :3] = colours
            layer[..., 3] = np.where(patches, share, 0)
            self.axes.imshow(layer, extent=box.extent, aspect="auto", interpolation="nearest", gid=gid)

    def veil(self, skipped: np.ndarray, box: Box, gid: str) -> None:
        """Veils the skipped patches, Boolean ``(rows, columns)``, of the picture called ``gid``."""
        self.paint(skipped, VEIL, VEIL_SHARE, box, f"{gid} skipped")

    def drop(self, dropped: np.ndarray, box: Box, gid: str) -> None:
        """Covers the dropped patches, Boolean ``(rows, columns)``, of the picture called ``gid``, and hatches them."""
        self.paint(dropped, GONE, 1, box, f"{gid} dropped")
        lines = [((column, row + 1), (column + 1, row)) for row, column in np.argwhere(dropped)]
        self._segments(lines, box, dropped.shape, colors="0.5", linewidths=0.5)

    def outline(self, regions: np.ndarray, outlined: np.ndarray, box: Box, gid: str) -> None:
        """Draws the borders of regions within the picture called ``gid``.

        Args:
            regions: ``(rows, columns)``, numbers that are equal within a region.
            outlined: Boolean ``(rows, columns)``, the patches of those regions whose borders are drawn.
        """
        across = [((column, row), (column + 1, row)) for row, column in _edges(regions, outlined)]
        down = [((column, row), (column, row + 1)) for column, row in _edges(regions.T, outlined.T)]
        width = min(0.8, box.width / regions.shape[1] / 20)
        # White on a dark line shows on bright pictures too.
        self._segments(across + down, box, regions.shape, colors=INK, linewidths=2.2 * width)
        self._segments(across + down, box, regions.shape, colors="white", linewidths=width, gid=f"{gid} borders")

    def heat(self, counts: np.ndarray, box: Box, most: int, gid: str) -> None:
        """Draws ``(rows, columns)`` counts as colours on a scale from 0 to ``most``."""
        self.scale.vmax = most
        colours = self.colours.cmap
        self.axes.imshow(
            counts, colours, self.scale, extent=box.extent, aspect="auto", interpolation="nearest", gid=gid
        )
        self._border(box)

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

    def lines(
        self, lines: Sequence[str], x: float, top: float, colour: str = INK, align: Literal["center", "left"] = "center"
    ) -> None:
        """Lines of small type, one under the other."""
        for number, words in enumerate(lines):
            self.text(words, x, top + LINE * (number + 0.5), SMALL_SIZE, colour, align=align)

    def colour_bar(self, left: float, top: float, height: float) -> None:
        """The scale of all heat maps."""
        place = (left / self.width, 1 - (top + height) / self.height, _BAR_WIDTH / self.width, height / self.height)
        bar = self.figure.colorbar(self.colours, cax=self.figure.add_axes(place))
        bar.locator = MaxNLocator(nbins=max(2, min(6, int(height / 30))), integer=True)
        bar.update_ticks()
        bar.ax.tick_params(labelsize=SMALL_SIZE, length=2, width=0.5, color=FAINT, labelcolor=INK)
        bar.outline.set_visible(False)
        bar.set_label("blocks", fontsize=SMALL_SIZE, color=INK)

    def _rule(self, box: Box, grid: tuple[int, int]) -> None:
        """Thin lines between the patches, unless they would cover the picture."""
        if box.width / grid[1] < _FINEST_RULED_PATCH:
            return
        rows, columns = grid
        across = [((0, row), (columns, row)) for row in range(1, rows)]
        down = [((column, 0), (column, rows)) for column in range(1, columns)]
        self._segments(across + down, box, grid, colors="0.6", linewidths=0.25, alpha=0.6)

    def _border(self, box: Box) -> None:
        corner = (box.left, box.top)
        self.axes.add_patch(Rectangle(corner, box.width, box.height, fill=False, edgecolor="0.6", linewidth=0.4))

    def _segments(self, lines: Sequence[_Line], box: Box, grid: tuple[int, ...], **style: Any) -> None:
        """Lines between points ``(column, row)`` of the grid of patches in ``box``."""
        if lines:
            patch = np.array([box.width / grid[1], box.height / grid[0]])
            places = np.array([box.left, box.top]) + patch * np.array(lines, dtype=float)
            self.axes.add_collection(LineCollection(list(places), **style))


def _shrunk(pixels: np.ndarray, box: Box) -> np.ndarray:
    """A photograph with about as many pixels as its panel can show: each panel keeps a copy of its own."""
    by = min(int(pixels.shape[0] / (_FINEST * box.height)), int(pixels.shape[1] / (_FINEST * box.width)))
    return pixels if by < 2 else np.asarray(Image.fromarray(pixels).reduce(by))


def _edges(regions: np.ndarray, outlined: np.ndarray) -> np.ndarray:
    """``(edges, 2)``: row and column of the patches above which an outlined region begins or ends."""
    edges = (regions[1:] != regions[:-1]) & (outlined[1:] | outlined[:-1])
    return np.argwhere(edges) + np.array([1, 0])


def wrap(text: str, width: float, most: int | None = None) -> list[str]:
    """At most ``most`` lines of small type, each at most ``width`` pixels wide; an ellipsis stands for the rest."""
    return textwrap.wrap(text, max(4, int(width / _CHARACTER)), max_lines=most, placeholder=" …")


@dataclass(frozen=True)
class Row:
    """One line of panels: those units of one ``kind`` that belong to ``blocks``, for one image.

    Args:
        image: number of the image.
        top: where the panels begin.
        bottom: where the next row may begin.
        headed: whether the blocks' numbers are written over the panels.
        first: whether the image itself stands in this row.
        last: whether the kind's panels end here, so that the heat map follows.
    """

    image: int
    kind: str
    blocks: Sequence[int]
    top: float
    bottom: float
    headed: bool
    first: bool
    last: bool


class TokensLayout:
    """Sizes panels so that a line of them is about 1600 pixels wide, and every patch a whole number of pixels.

    Args:
        images: how many.
        kinds: kinds of units, one or more lines of panels each.
        blocks: numbers of the blocks.
        columns: panels in a line.
        grid: rows and columns of patches.
        lines: of text under each panel.
        heat: whether a heat map and its colour bar follow the last panel of each kind.
        widest: most pixels that a panel is wide.
    """

    def __init__(
        self,
        images: int,
        kinds: Sequence[str],
        blocks: Sequence[int],
        columns: int,
        grid: tuple[int, int],
        *,
        lines: int = 1,
        heat: bool = True,
        widest: int = 150,
    ) -> None:
        self.images = images
        self.kinds = kinds
        self.grid = grid
        self.lines = lines
        self.chunks = [blocks[start : start + columns] for start in range(0, len(blocks), columns)]
        fixed = 2 * _MARGIN + _STRIP + (3 * _GAP + _BAR + _BAR_TEXT if heat else 0)
        most = min(widest, (_WIDE - fixed) / (columns + (2 if heat else 1)) - _GAP)
        # A tall grid must not make a page of one image, nor a fine one patches that cannot be seen.
        patch = max(2, round(min(most / grid[1], 1.5 * most / grid[0])))
        self.panel_width = patch * grid[1]
        self.panel_height = patch * grid[0]
        self.image_left = _MARGIN
        self.kind_centre = _MARGIN + self.panel_width + _STRIP / 2
        self.heat_left = self.panel_left(columns) + _GAP
        self.bar_left = self.heat_left + self.panel_width + 2 * _GAP
        self.width = (self.bar_left + _BAR + _BAR_TEXT if heat else self.panel_left(columns) - _GAP) + _MARGIN

    def captions(self, titles: Sequence[str] | None) -> list[list[str]]:
        """The lines of text to put under each image."""
        return [wrap(printable(title), self.panel_width, _MOST_CAPTION_LINES) for title in titles or [""] * self.images]

    def panel_left(self, place: int) -> float:
        """The left edge of the ``place``-th panel of a line."""
        return _MARGIN + self.panel_width + _STRIP + place * (self.panel_width + _GAP)

    def box(self, left: float, row: Row) -> Box:
        """A panel of ``row`` that begins at ``left``."""
        return Box(left, row.top, self.panel_width, self.panel_height)

    def rows(self, caption_lines: Sequence[int]) -> list[Row]:
        """All rows from top to bottom; ``caption_lines[b]`` lines of text stand under image b.

        The blocks' numbers are repeated only where they differ from those above.
        """
        found: list[Row] = []
        top: float = _MARGIN
        headed_for: Sequence[int] = ()
        for image in range(self.images):
            captioned = top
            for kind in self.kinds:
                for number, blocks in enumerate(self.chunks):
                    headed = blocks != headed_for
                    headed_for = blocks
                    top += LINE if headed else 0
                    first = kind == self.kinds[0] and number == 0
                    if first:
                        captioned = top + self.panel_height + LINE * caption_lines[image]
                    bottom = top + self.panel_height + self.lines * LINE + _GAP
                    last_of_image = kind == self.kinds[-1] and number == len(self.chunks) - 1
                    if last_of_image:
                        bottom = max(bottom, captioned + _GAP) + (2 * _GAP if len(self.kinds) > 1 else 0)
                    found.append(Row(image, kind, blocks, top, bottom, headed, first, blocks is self.chunks[-1]))
                    top = bottom
        return found


def check_numbers(images: int, titles: Sequence[str] | None, columns: int) -> None:
    """Checks that there is something to lay out.

    Raises:
        ValueError: no image, no column, or not one title for each image.
    """
    if not images or columns < 1:
        raise ValueError(f"{counted(images, 'image')} in {counted(columns, 'column')}: expected at least one of each.")
    if titles is not None and len(titles) != images:
        raise ValueError(f"{counted(len(titles), 'title')} for {counted(images, 'image')}: expected one for each.")
