"""Strips and animations of a clip's frames show which patches each unit computed, and the right shares."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_token_figure import GRID, PATCHES, gate, panels, picture, rendered_patches, texts

from dyntune import DyntuneError
from dyntune.studies.pictures import by_slices, frames_animation, frames_figure
from dyntune.studies.pictures.page import VEIL, VEIL_SHARE

FRAMES = 3


def gates(blocks):
    generator = torch.Generator().manual_seed(0)
    return [gate(f"blocks.{b}.mlp", torch.rand(FRAMES, PATCHES, generator=generator) < 0.4) for b in blocks]


def test_skipped_patches_of_each_frame_are_veiled():
    frames = [picture(seed) for seed in range(FRAMES)]
    own = gates([0, 1])
    figure = frames_figure(frames, own, GRID)
    for number, frame in enumerate(frames):
        colours = np.asarray(frame) / 255
        active = own[1].values[number].view(GRID).bool().numpy()
        veiled = (1 - VEIL_SHARE) * colours + VEIL_SHARE * np.array(VEIL)
        expected = np.where(active[..., None], colours, veiled)[:, :, None]
        shown = rendered_patches(figure, f"frame {number} block 1 mlp")
        assert np.abs(shown - expected).max() < 0.02
        assert f"{100 * active.mean():.0f} %" in texts(figure)


def test_the_last_row_counts_the_units_and_four_blocks_are_shown():
    own = gates(range(12))
    figure = frames_figure([picture()] * FRAMES, own, GRID)
    shown = {" ".join(gid.split(" block ")[1].split()[:2]) for gid in panels(figure) if " block " in gid}
    assert shown == {"1 mlp", "4 mlp", "7 mlp", "10 mlp"}
    counts = sum(one.values[2] for one in own).view(GRID).numpy()
    assert any(text.startswith("Drawn: blocks 1, 4, 7, 10 of 12 with gates.") for text in texts(figure))
    assert np.array_equal(panels(figure)["frame 2 times active"].get_array(), counts)
    assert len({gid for gid in panels(frames_figure([picture()] * FRAMES, own, GRID, [3])) if "block 3" in gid}) >= 3
    every = frames_figure([picture()] * FRAMES, own, GRID, range(12))
    assert not any(text.startswith("Drawn") for text in texts(every))


def test_an_animation_has_a_picture_for_each_frame(tmp_path):
    path = frames_animation([picture(seed) for seed in range(FRAMES)], gates([0, 1]), GRID, tmp_path / "film.gif")
    with Image.open(path) as film:
        assert film.n_frames == FRAMES and film.info["duration"] == 400
        first = np.asarray(film.convert("RGB"))
        film.seek(1)
        assert not np.array_equal(first, np.asarray(film.convert("RGB")))


def test_an_animation_may_be_an_mp4(tmp_path):
    pytest.importorskip("av")
    from dyntune.data import Video

    frames, own = [picture(seed) for seed in range(FRAMES)], gates([0, 1])
    film = Video(frames_animation(frames, own, GRID, tmp_path / "film.mp4", seconds=0.5))
    assert len(film) == FRAMES and film.about().rate == 2
    frames_animation(frames, own, GRID, tmp_path / "film.gif")
    with Image.open(tmp_path / "film.gif") as drawn:
        for number, frame in enumerate(film.read(range(FRAMES))):
            drawn.seek(number)
            pixels = np.asarray(frame.crop((0, 0, *drawn.size)), float) - np.asarray(drawn.convert("RGB"), float)
            assert all(0 <= more <= 1 for more in np.subtract(frame.size, drawn.size)) and np.abs(pixels).mean() < 12
    with pytest.raises(DyntuneError, match=r"ends in \.gif or \.mp4"):
        frames_animation(frames, own, GRID, tmp_path / "film.webm")


def test_gates_about_a_whole_clip_are_parted_by_moments():
    whole = gate("blocks.0.mlp", torch.arange(2 * PATCHES)[None] % 3 == 0)
    (parted,) = by_slices([whole], 2)
    assert torch.equal(parted.on_patches.flatten(), whole.values[0])
    figure = frames_figure([picture(0), picture(1)], [parted], GRID)
    assert "33 %" in texts(figure)


def test_a_model_without_gates_has_nothing_to_show():
    with pytest.raises(DyntuneError, match="gates no unit"):
        frames_figure([picture()], [], GRID)
    with pytest.raises(DyntuneError, match=r"no unit is gated in the blocks 5; those with gates are 0, 2\."):
        frames_figure([picture()] * FRAMES, gates([0, 2]), GRID, [5, 2])
