"""Which patches of a clip's frames each gated unit computed: as a strip of frames, and as an animation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from dyntune.core.errors import DyntuneError
from dyntune.core.files import write_atomically
from dyntune.core.tokens import Provenance
from dyntune.data.transforms import Preprocessing
from dyntune.data.video_files import write_video
from dyntune.parts.policies.base import Gate, Output
from dyntune.studies.pictures.page import LINE, Box, Page, check_numbers, wrap
from dyntune.studies.pictures.patches import KINDS, blocks_in_words, gated_blocks, split_path, states_at_gate
from dyntune.studies.pictures.style import FAINT, TITLE_SIZE, percent
from dyntune.studies.pictures.tokens import token_figure

_NOTE = "Skipped patches are veiled in pale blue. Under each panel: share of the tokens that were active."
_MARGIN, _GAP, _LABEL = 14, 6, 64
_WIDEST, _PAGE = 150, 1600
FILMS = (".gif", ".mp4")
"""Suffixes of animations."""
_SHOWN = 4
"""Units in a strip, where none are named."""


def frames_figure(
    frames: Sequence[Image.Image], gates: Sequence[Gate], grid: tuple[int, int], blocks: Sequence[int] | None = None
) -> Figure:
    """A clip's frames from left to right, and under them, for some gated units, the patches that each computed.

    The last row tells in how many of all gated units each patch was active, as in a token figure.

    Args:
        frames: T images, in their order, as they were before normalisation.
        gates: decisions of one forward pass on the clip, ``on_patches`` ``(T, P)``.
        grid: rows and columns of patches; P is their product, row by row.
        blocks: numbers of the blocks to show; four that lie evenly if not given.

    Raises:
        DyntuneError: there are no gates, or none in one of these blocks.
        ValueError: numbers of frames and patches do not fit the gates, or a path is no unit's.
    """
    check_numbers(len(frames), None, 1)
    blocks = strip_blocks(gates) if blocks is None else gated_blocks(gates, blocks)
    units = [split_path(gate.unit) for gate in gates]
    shown = [place for place, (block, _) in enumerate(units) if block in blocks]
    states = [states_at_gate(gate, len(frames), grid) for gate in gates]
    most = min(_WIDEST, (_PAGE - 2 * _MARGIN - _LABEL) / len(frames) - _GAP)
    patch = max(2, round(min(most / grid[1], 1.5 * most / grid[0])))
    width, height = patch * grid[1], patch * grid[0]
    page_width = 2 * _MARGIN + _LABEL + len(frames) * (width + _GAP)
    drawn = blocks_in_words(blocks, gates)
    note = wrap(f"Drawn: {drawn}. {_NOTE}" if drawn else _NOTE, page_width - 2 * _MARGIN)
    page = Page(page_width, 2 * _MARGIN + LINE + (len(shown) + 2) * (height + LINE + _GAP) + LINE * len(note))
    pixels = [np.asarray(frame.convert("RGB")) for frame in frames]
    top: float = _MARGIN + LINE
    for number in range(len(frames)):
        box = Box(_MARGIN + _LABEL + number * (width + _GAP), top, width, height)
        page.text(f"frame {number}", box.centre, top - LINE / 2, TITLE_SIZE)
        page.picture(pixels[number], box, f"frame {number}")
        below = top
        for place in shown:
            below += height + LINE + _GAP
            block, kind = units[place]
            box = replace(box, top=below)
            if not number:
                page.lines([f"block {block}", KINDS[kind]], _MARGIN + _LABEL / 2, below, FAINT)
            state = states[place][number]
            gid = f"frame {number} block {block} {kind}"
            page.picture(pixels[number], box, gid)
            page.veil(state.skipped, box, gid)
            page.drop(state.dropped, box, gid)
            page.lines([percent(state.share, 0)], box.centre, box.bottom, FAINT)
        box = replace(box, top=below + height + LINE + _GAP)
        counts = np.sum([one[number].active for one in states], axis=0)
        page.heat(counts, box, len(gates), f"frame {number} times active")
        share = sum(one[number].share for one in states) / len(states)
        page.lines([percent(share, 0)], box.centre, box.bottom, FAINT)
        if not number:
            page.lines(["times", "active"], _MARGIN + _LABEL / 2, box.top, FAINT)
    page.lines(note, _MARGIN, box.bottom + LINE + _GAP, FAINT, "left")
    return page.figure


def strip_blocks(gates: Sequence[Gate]) -> list[int]:
    """Numbers of the blocks that a strip of frames shows by itself: four with gates that lie evenly, or all of fewer.

    Raises:
        DyntuneError: there are no gates.
    """
    known = gated_blocks(gates)
    return known[1 :: len(known) // _SHOWN][:_SHOWN] if len(known) > _SHOWN else known


def frames_animation(
    frames: Sequence[Image.Image],
    gates: Sequence[Gate],
    grid: tuple[int, int],
    path: Path,
    seconds: float = 0.4,
    blocks: Sequence[int] | None = None,
) -> Path:
    """Writes a film that shows one frame of a clip after the other, each as a token figure.

    Args:
        frames: as for ``frames_figure``.
        gates: as for ``frames_figure``.
        grid: as for ``frames_figure``.
        path: of the file, an animated GIF, or an MP4 by its suffix, which needs PyAV.
        seconds: that each frame is shown.
        blocks: numbers of the blocks to show; all with gates if not given.

    Returns:
        The path.

    Raises:
        DyntuneError: it has another suffix, or PyAV is not installed; there are no gates in one of the blocks.
    """
    if path.suffix not in FILMS:
        raise DyntuneError(f"{path}: expected a file that ends in {' or '.join(FILMS)}.")
    pictures = [
        _rendered(
            token_figure([frame], [_of_frame(gate, number) for gate in gates], grid, [f"frame {number}"], blocks=blocks)
        )
        for number, frame in enumerate(frames)
    ]
    if path.suffix == ".mp4":
        write_video(path, map(_even, pictures), rate=Fraction(1 / seconds).limit_denominator(1000))
        return path
    first, *others = pictures
    options = {"save_all": True, "append_images": others, "duration": round(1000 * seconds), "loop": 0}
    write_atomically(path, lambda file: first.save(file, format="gif", **options))
    return path


def of_clip(
    clip: Tensor, preprocessing: Preprocessing, output: Output, slices: int
) -> tuple[list[Image.Image], list[Gate], tuple[int, int]]:
    """The frames of a clip, and of each frame's patches the gates and the grid.

    Args:
        clip: ``(T, 3, height, width)``, as the model was given it.
        preprocessing: what it went through.
        output: what the model decided about it.
        slices: moments in time that the tokens of the whole clip are of, each of several frames, of which the first
            stands for all; 1 where each frame has tokens of its own.
    """
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    pixels = ((clip * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    frames = [Image.fromarray(frame.permute(1, 2, 0).numpy()) for frame in pixels]
    if slices == 1:
        return frames, list(output.gates), output.grid
    rows, columns = output.grid
    return frames[:: len(frames) // slices], by_slices(output.gates, slices), (rows // slices, columns)


def by_slices(gates: Sequence[Gate], slices: int) -> list[Gate]:
    """Gates about a whole clip, ``(1, P)``, as ones about its moments in time, each with an image's grid of patches."""
    return [
        replace(gate, values=gate.on_patches.view(slices, -1), logits=None, provenance=Provenance()) for gate in gates
    ]


def _of_frame(gate: Gate, number: int) -> Gate:
    """A gate's decisions about one frame."""
    came = gate.provenance
    own = (None if tensor is None else tensor[number : number + 1] for tensor in (came.owner, came.sizes, came.present))
    return replace(gate, values=gate.values[number : number + 1], logits=None, provenance=Provenance(*own))


def _even(picture: Image.Image) -> np.ndarray:
    """Its pixels, with a white row and column more where there is an odd number of them, as H.264 needs."""
    pixels = np.asarray(picture)
    return np.pad(pixels, ((0, len(pixels) % 2), (0, pixels.shape[1] % 2), (0, 0)), constant_values=255)


def _rendered(figure: Figure) -> Image.Image:
    canvas = figure.canvas
    assert isinstance(canvas, FigureCanvasAgg)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
