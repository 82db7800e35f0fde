"""Where the panels of a token figure go, in pixels from the top left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dyntune.studies.pictures.page import LINE, Box, wrap

_WIDE = 1600
_MARGIN = 14
_GAP = 6
_STRIP = 26
_BAR = 14
_BAR_TEXT = 64
_MOST_CAPTION_LINES = 3


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
        return [wrap(title, self.panel_width, _MOST_CAPTION_LINES) for title in titles or [""] * self.images]

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
        raise ValueError(f"{images} images in {columns} columns: expected at least one of each.")
    if titles is not None and len(titles) != images:
        raise ValueError(f"{len(titles)} titles for {images} images: expected one for each.")
