"""What a model makes of the tokens of an image, block by block: merged, dropped, skipped by a gate, or kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from dyntune.core.errors import DyntuneError
from dyntune.parts.policies.base import Output
from dyntune.studies.pictures.page import LINE, Box, Page, TokensLayout, check_numbers, wrap
from dyntune.studies.pictures.patches import KINDS, PatchState, mean_colours, split_path, states_after, states_at_gate
from dyntune.studies.pictures.style import FAINT, INK, TITLE_SIZE, percent

_NOTE = (
    "A panel shows the tokens behind the reduction in front of its block or MLP; a block without a panel leaves them "
    "as in the panel before. Class, register and prompt tokens are always kept, not counted."
)
_WIDEST = 240
_PANELS_IN_A_LINE = 6
"""More only where there would be a third line."""
_SWATCH = LINE - 4
_GATED = ("mlp", "layer", "attn")
"""Kinds of units; a panel shows the gates of the first kind that the model gates."""


@dataclass(frozen=True)
class _Photo:
    """An image in full, and reduced to the mean colour of each patch."""

    pixels: np.ndarray
    patches: np.ndarray

    @classmethod
    def of(cls, image: Image.Image, grid: tuple[int, int]) -> _Photo:
        image = image.convert("RGB")
        return cls(np.asarray(image), np.asarray(image.resize(grid[::-1], Image.Resampling.BOX)))


def reduction_figure(
    images: Sequence[Image.Image], output: Output, titles: Sequence[str] | None = None, *, columns: int | None = None
) -> Figure:
    """For each image: the image, and its patches at every block that merges, drops or skips some of them.

    Patches that have become one token are shown in its mean colour with a border around them, a fused token like any
    other; dropped patches are dark and hatched, those of skipped tokens are veiled. Under each panel stand the number
    of tokens left and, for a gated block, the share of them that it computed.

    Args:
        images: B images of any size, as they were before normalisation.
        output: of one forward pass on these images.
        titles: B short texts to put under the images.
        columns: panels in a line; None for at most two lines per image.

    Raises:
        DyntuneError: no tokens were reduced.
        ValueError: numbers of images, titles, patches or columns do not fit each other, or a path is no unit's.
    """
    check_numbers(len(images), titles, 1 if columns is None else columns)
    if not output.reductions:
        raise DyntuneError(
            "the model neither merges nor drops tokens, so there is no reduction to show; tune it with a policy that "
            "does, such as tome, or draw its gates with token_figure."
        )
    kind, states = _states(output, len(images))
    blocks = sorted(states)
    columns = min(len(blocks), columns or max(_PANELS_IN_A_LINE, (len(blocks) + 1) // 2))
    under = 2 if kind else 1
    layout = TokensLayout(
        len(images), ["tokens"], blocks, columns, output.grid, lines=under, heat=False, widest=_WIDEST
    )
    captions = layout.captions(titles)
    rows = layout.rows([len(caption) for caption in captions])
    legend = _legend([state for shown in states.values() for state in shown], kind)
    note = wrap(_NOTE, layout.width)
    left = layout.image_left + _SWATCH + LINE / 2
    entries = [(wrap(words, layout.width - left), words, state) for words, state in legend.items()]
    count = sum(len(lines) for lines, _, _ in entries) + len(note)
    page = Page(layout.width, rows[-1].bottom + LINE * (count + 0.5))
    photos = [_Photo.of(image, output.grid) for image in images]
    for row in rows:
        photo = photos[row.image]
        if row.first:
            box = layout.box(layout.image_left, row)
            page.photograph(photo.pixels, box, output.grid, captions[row.image], f"image {row.image}")
        for place, block in enumerate(row.blocks):
            box = layout.box(layout.panel_left(place), row)
            state = states[block][row.image]
            if row.headed:
                page.text(f"block {block}", box.centre, box.top - LINE / 2, TITLE_SIZE)
            _draw(page, photo, state, box, f"image {row.image} block {block}")
            active = [f"{percent(state.share, 0)} active"] if kind else []
            tokens = f"{state.tokens} token" + "s" * (state.tokens != 1)
            page.lines([tokens, *active], box.centre, box.bottom, FAINT)
    top = rows[-1].bottom
    for lines, words, state in entries:
        box = Box(layout.image_left, top + (LINE - _SWATCH) / 2, _SWATCH, _SWATCH)
        _draw(page, _Photo.of(images[0], (2, 2)), state, box, f"legend {words}")
        page.lines(lines, left, top, INK, "left")
        top += LINE * len(lines)
    page.lines(note, layout.image_left, top, FAINT, "left")
    return page.figure


def _states(output: Output, images: int) -> tuple[str | None, dict[int, list[PatchState]]]:
    """The kind of units whose gates are shown, if any, and by block number the state of each image's patches."""
    states = {}
    for reduction in output.reductions:
        states[split_path(reduction.unit)[0]] = states_after(reduction.provenance, reduction.unit, images, output.grid)
    places = [(*split_path(gate.unit), gate) for gate in output.gates]
    kind = next((kind for kind in _GATED if any(kind == its_kind for _, its_kind, _ in places)), None)
    for block, its_kind, gate in places:
        if its_kind == kind:
            states[block] = states_at_gate(gate, images, output.grid)
    return kind, states


def _draw(page: Page, photo: _Photo, state: PatchState, box: Box, gid: str) -> None:
    """The photograph with the tokens that its patches have become."""
    page.picture(photo.pixels, box, gid)
    page.paint(state.merged, mean_colours(photo.patches, state.owner), 1, box, f"{gid} merged")
    page.veil(state.skipped, box, gid)
    page.drop(state.dropped, box, gid)
    page.outline(state.owner, state.merged, box, gid)


def _legend(states: Sequence[PatchState], kind: str | None) -> dict[str, PatchState]:
    """What occurs in the figure, in words and as the state of a picture of four patches."""
    alone, everywhere, nowhere = np.arange(4).reshape(2, 2), np.ones((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool)
    entries = {"kept: a token for this patch alone": PatchState(alone, everywhere)}
    if any(state.merged.any() for state in states):
        three = np.array([[0, 0], [0, 1]])
        entries["merged: patches of one token, in its mean colour and outlined"] = PatchState(three, everywhere)
    if any(state.dropped.any() for state in states):
        entries["dropped: no token any more"] = PatchState(np.full((2, 2), -1), nowhere)
    if kind:
        entries[f"skipped: the gate of the {KINDS[kind]} did not let the token in"] = PatchState(alone, nowhere)
    return entries
