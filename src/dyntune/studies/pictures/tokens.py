"""Which patches each gated unit computed, drawn on the images: skipped patches are veiled, active ones stay."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dyntune.parts.policies.base import Gate
from dyntune.studies.pictures.page import LINE, Page, Row, TokensLayout, check_numbers, wrap
from dyntune.studies.pictures.patches import (
    KINDS,
    PatchState,
    blocks_in_words,
    gated_blocks,
    split_path,
    states_at_gate,
)
from dyntune.studies.pictures.style import FAINT, SMALL_SIZE, TITLE_SIZE, percent

_NOTE = "Skipped patches are veiled in pale blue. Under each panel: share of {} that were active."
_MERGED = "Merged patches are computed or skipped together."
_DROPPED = "Dropped patches are dark and hatched."
_BAR_HEIGHT = 200

_States = dict[tuple[int, str], list[PatchState]]
"""The state of each image's patches by block number and kind of unit."""


def token_figure(
    images: Sequence[Image.Image],
    gates: Sequence[Gate],
    grid: tuple[int, int],
    titles: Sequence[str] | None = None,
    *,
    columns: int = 12,
    blocks: Sequence[int] | None = None,
) -> Figure:
    """For each image: the image, a panel per gated unit, and in how many blocks each patch was active.

    Attention and MLP units have a line of panels each, so dispatch at ``attn-mlp`` gives two lines per image. Images
    are stretched to the patch grid, as models see them; small ones are enlarged without smoothing.

    Args:
        images: B images of any size, as they were before normalisation.
        gates: decisions of one forward pass on these images, ``on_patches`` ``(B, P)``.
        grid: rows and columns of patches; P is their product, row by row.
        titles: B short texts to put under the images.
        columns: panels in a line; models with more blocks than that get several lines.
        blocks: numbers of the blocks to show; all with gates if not given. The last panel counts all of them.

    Raises:
        DyntuneError: there are no gates, or none in one of these blocks.
        ValueError: numbers of images, titles, patches or columns do not fit each other, or a path is no unit's.
    """
    check_numbers(len(images), titles, columns)
    blocks = gated_blocks(gates, blocks)
    states = {split_path(gate.unit): states_at_gate(gate, len(images), grid) for gate in gates}
    kinds = [kind for kind in KINDS if any(kind == its_kind for _, its_kind in states)]
    layout = TokensLayout(len(images), kinds, blocks, min(columns, len(blocks)), grid)
    captions = layout.captions(titles)
    rows = layout.rows([len(caption) for caption in captions])
    every = [state for shown in states.values() for state in shown]
    note = wrap(_note(every, blocks_in_words(blocks, gates)), layout.width)
    page = Page(layout.width, rows[-1].bottom + LINE * (len(note) + 0.5))
    times = {kind: [shown for (_, its_kind), shown in states.items() if its_kind == kind] for kind in kinds}
    most = max(len(shown) for shown in times.values())
    for row in rows:
        pixels = np.asarray(images[row.image].convert("RGB"))
        if row.first:
            box = layout.box(layout.image_left, row)
            page.photograph(pixels, box, grid, captions[row.image], f"image {row.image}")
        _draw_units(page, layout, row, pixels, states)
        if row.last:
            box = layout.box(layout.heat_left, row)
            if row.headed:
                page.text("times active", box.centre, box.top - LINE / 2, TITLE_SIZE)
            counts = np.sum([shown[row.image].active for shown in times[row.kind]], axis=0)
            page.heat(counts, box, most, f"image {row.image} times {row.kind}")
    top = next(row.top for row in rows if row.last)
    page.colour_bar(layout.bar_left, top, min(_BAR_HEIGHT, rows[-1].top + layout.panel_height - top))
    page.lines(note, layout.image_left, rows[-1].bottom, FAINT, "left")
    return page.figure


def _note(states: Sequence[PatchState], blocks: str) -> str:
    """What the figure's panels show, as far as it occurs, and which blocks where not all are drawn."""
    dropped = any(state.dropped.any() for state in states)
    merged = any(state.merged.any() for state in states)
    note = _NOTE.format("the tokens left" if dropped or merged else "patches")
    drawn = [f"Drawn: {blocks}."] if blocks else []
    return " ".join([*drawn, note, *[_MERGED] * merged, *[_DROPPED] * dropped])


def _draw_units(page: Page, layout: TokensLayout, row: Row, pixels: np.ndarray, states: _States) -> None:
    """A row's panels, each with its share of active tokens; the place of a block that is not gated stays empty."""
    middle = row.top + layout.panel_height / 2
    page.text(KINDS[row.kind], layout.kind_centre, middle, SMALL_SIZE, FAINT, rotation=90)
    for place, block in enumerate(row.blocks):
        box = layout.box(layout.panel_left(place), row)
        if row.headed:
            page.text(f"block {block}", box.centre, box.top - LINE / 2, TITLE_SIZE)
        if (block, row.kind) in states:
            state = states[block, row.kind][row.image]
            gid = f"image {row.image} block {block} {row.kind}"
            page.picture(pixels, box, gid)
            page.veil(state.skipped, box, gid)
            page.drop(state.dropped, box, gid)
            page.lines([percent(state.share, 0)], box.centre, box.bottom, FAINT)
