"""Which patches each gated unit computed, drawn on the images: skipped patches are veiled, active ones stay."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dyntune.errors import DyntuneError
from dyntune.policies.base import Gate
from dyntune.visualize.page import Page
from dyntune.visualize.style import FAINT, SMALL_SIZE, TITLE_SIZE, percent
from dyntune.visualize.tokens_layout import LINE, Row, TokensLayout
from dyntune.visualize.units import KINDS, split_path

_NOTE = "Skipped patches are veiled in pale blue. Under each panel: share of patches that were active."
_CHARACTER = 7.8
"""Pixels that one character of small type takes, about."""
_MOST_CAPTION_LINES = 3
_BAR_HEIGHT = 200

_Active = dict[tuple[int, str], np.ndarray]
"""Boolean ``(B, rows, columns)`` by block number and kind of unit."""


def token_figure(
    images: Sequence[Image.Image],
    gates: Sequence[Gate],
    grid: tuple[int, int],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 12,
) -> Figure:
    """For each image: the image, a panel per gated unit, and in how many blocks each patch was active.

    Attention and MLP units have a line of panels each, so dispatch at ``attn-mlp`` gives two lines per image. Images
    are stretched to the patch grid, as models see them; small ones are enlarged without smoothing.

    Args:
        images: B images of any size, as they were before normalisation.
        gates: decisions of one forward pass on these images, ``values`` ``(B, P)``.
        grid: rows and columns of patches; P is their product, row by row.
        titles: B short texts to put under the images.
        columns: panels in a line; models with more blocks than that get several lines.

    Raises:
        DyntuneError: there are no gates.
        ValueError: numbers of images, titles, patches or columns do not fit each other, or a path is no unit's.
    """
    if not images or columns < 1:
        raise ValueError(f"{len(images)} images in {columns} columns: expected at least one of each.")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(titles)} titles for {len(images)} images: expected one for each.")
    active = _active(gates, len(images), grid)
    kinds = [kind for kind in KINDS if any(kind == its_kind for _, its_kind in active)]
    blocks = sorted({block for block, _ in active})
    layout = TokensLayout(len(images), kinds, blocks, min(columns, len(blocks)), grid)
    captions = [_wrap(title, layout.panel_width, _MOST_CAPTION_LINES) for title in titles or [""] * len(images)]
    rows = layout.rows([len(caption) for caption in captions])
    note = _wrap(_NOTE, layout.width)
    page = Page(layout.width, rows[-1].bottom + LINE * (len(note) + 0.5))
    times = {kind: [shown for (_, its_kind), shown in active.items() if its_kind == kind] for kind in kinds}
    most = max(len(shown) for shown in times.values())
    for row in rows:
        pixels = np.asarray(images[row.image].convert("RGB"))
        if row.first:
            _draw_image(page, layout, row, pixels, captions[row.image])
        _draw_units(page, layout, row, pixels, active)
        if row.last:
            box = layout.box(layout.heat_left, row)
            if row.headed:
                page.text("times active", box.centre, box.top - LINE / 2, TITLE_SIZE)
            counts = np.sum([shown[row.image] for shown in times[row.kind]], axis=0)
            page.heat(counts, box, most, f"image {row.image} times {row.kind}")
    top = next(row.top for row in rows if row.last)
    page.colour_bar(layout.bar_left, top, min(_BAR_HEIGHT, rows[-1].top + layout.panel_height - top))
    for line, text in enumerate(note):
        page.text(text, layout.image_left, rows[-1].bottom + LINE * (line + 0.5), SMALL_SIZE, FAINT, align="left")
    return page.figure


def _active(gates: Sequence[Gate], images: int, grid: tuple[int, int]) -> _Active:
    """The gates, checked, on the CPU and in the shape of the grid."""
    if not gates:
        raise DyntuneError("the model gates no unit, so no patches are skipped; tune it with dyt or dispatch.")
    expected = (images, grid[0] * grid[1])
    active = {}
    for gate in gates:
        given = tuple(gate.values.shape)
        if given != expected:
            raise ValueError(f"the gate of {gate.unit} has shape {given}: expected (images, patches) = {expected}.")
        active[split_path(gate.unit)] = (gate.values.detach().float().cpu().numpy() > 0.5).reshape(images, *grid)
    return active


def _draw_image(page: Page, layout: TokensLayout, row: Row, pixels: np.ndarray, caption: Sequence[str]) -> None:
    """The image with its patches ruled, and its caption under it."""
    box = layout.box(layout.image_left, row)
    page.picture(pixels, box, f"image {row.image}")
    page.patch_lines(box, layout.grid)
    for line, text in enumerate(caption):
        page.text(text, box.centre, box.bottom + LINE * (line + 0.5), SMALL_SIZE)


def _draw_units(page: Page, layout: TokensLayout, row: Row, pixels: np.ndarray, active: _Active) -> None:
    """A row's panels, each with its share of active patches; the place of a block that is not gated stays empty."""
    middle = row.top + layout.panel_height / 2
    page.text(KINDS[row.kind], layout.kind_centre, middle, SMALL_SIZE, FAINT, rotation=90)
    for place, block in enumerate(row.blocks):
        box = layout.box(layout.panel_left(place), row)
        if row.headed:
            page.text(f"block {block}", box.centre, box.top - LINE / 2, TITLE_SIZE)
        if (block, row.kind) in active:
            shown = active[block, row.kind][row.image]
            page.picture(pixels, box, f"image {row.image} block {block} {row.kind}", shown)
            page.text(percent(float(shown.mean()), 0), box.centre, box.bottom + LINE / 2, SMALL_SIZE, FAINT)


def _wrap(text: str, width: float, most: int | None = None) -> list[str]:
    """At most ``most`` lines of small type, each at most ``width`` pixels wide; an ellipsis stands for the rest."""
    return textwrap.wrap(text, max(4, int(width / _CHARACTER)), max_lines=most, placeholder=" …")
