"""The drawn videos: classes differ in the order of frames alone, files are real, written once and whole."""

import multiprocessing

import numpy as np
import pytest

from dyntune.data import load_data
from dyntune.data.drawn import motion
from dyntune.data.drawn.motion import CLASSES, PAIRS, motion_frames, write_motion
from dyntune.data.videos import Video

pytest.importorskip("av")


@pytest.mark.parametrize("pair", PAIRS)
def test_a_video_backwards_is_one_of_its_partner(pair):
    one, other = (motion_frames(name, "val", 3) for name in pair)
    assert all(np.array_equal(a, b) for a, b in zip(one, other[::-1], strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def covered(frames):
    """Where pixels differ from the ground, which is what most frames show."""
    stack = np.stack(frames).astype(float)
    return [(np.abs(frame - np.median(stack, 0)).sum(-1) > 60).nonzero() for frame in (stack[0], stack[-1])]


@pytest.mark.parametrize(("name", "axis", "grows"), [("right", 1, True), ("left", 1, False), ("down", 0, True)])
def test_what_moves_goes_where_its_class_says(name, axis, grows):
    first, last = covered(motion_frames(name, "train", 5))
    assert (last[axis].mean() > first[axis].mean() + 5) == grows


def test_files_are_written_once_and_read_as_any_folder(tmp_path, monkeypatch):
    counts = {"train": 2, "val": 1, "test": 1}
    monkeypatch.setattr(motion, "COUNTS", counts)
    context = multiprocessing.get_context("forkserver")
    others = [context.Process(target=write_motion, args=(tmp_path / "motion", counts)) for _ in range(2)]
    for process in others:
        process.start()
    for process in others:
        process.join(300)
        assert process.exitcode == 0
    data = load_data("motion", root=tmp_path)
    assert data.classes == tuple(sorted(CLASSES)) and [len(s) for s in (data.train, data.val, data.test)] == [16, 8, 8]
    video = data.train.read(0)
    assert len(video) == motion.FRAMES and video.about().size == (64, 64)
    drawn = motion_frames("down", "train", CLASSES.index("down"))
    read = np.asarray(Video(tmp_path / "motion" / "train" / "down" / "000.mp4").read([5])[0], float)
    assert np.abs(read - drawn[5]).mean() < 12
    victim = tmp_path / "motion" / "val" / "up" / "000.mp4"
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "motion").rglob("*.mp4") if path != victim}
    victim.unlink()
    load_data("motion", root=tmp_path)
    assert victim.exists() and all(path.stat().st_mtime_ns == time for path, time in before.items())
