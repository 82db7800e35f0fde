"""Video files, folders and lists of them, on real files that are written on the spot."""

import multiprocessing
import pickle
import shutil
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import Preprocessing, build_transform, load_data, load_held
from dyntune.data.clips import Sampling
from dyntune.data.videos import Video, expand_videos, list_videos

av = pytest.importorskip("av")
from dyntune.data.video_files import about, write_video  # noqa: E402

COUNT = 30


def frames_of(count, height=48, width=64):
    """Frames whose grey level is eight times their number, brighter in the upper half."""
    for number in range(count):
        frame = np.full((height, width, 3), number * 8 % 250, np.uint8)
        frame[: height // 2] += 5
        yield frame


def numbers(video, indices):
    return [round((np.asarray(frame, float).mean() - 2.5) / 8) for frame in video.read(indices)]


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "film.mp4"
    write_video(path, frames_of(COUNT))
    return path


def encoded(path, codec, container, times=None, count=COUNT, **options):
    """A file in another format, or with its frames at given times, in thousandths of a second."""
    from fractions import Fraction

    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=12, options=options)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames_of(count)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def test_frames_are_read_by_their_number(film):
    video = Video(film)
    assert len(video) == COUNT and video.about().size == (64, 48)
    assert numbers(video, [3, 0, 29, 3]) == [3, 0, 29, 3]
    assert numbers(Video(film.read_bytes()), [7]) == [7]
    with pytest.raises(DataError, match="has 30 frames"):
        video.read([30])


def test_a_name_with_a_colon_in_the_current_folder_is_no_address(film, tmp_path, monkeypatch):
    shutil.copy(film, tmp_path / "2024-01-01T10:30:00.mp4")
    monkeypatch.chdir(tmp_path)
    assert numbers(Video("2024-01-01T10:30:00.mp4"), [3]) == [3]


@pytest.mark.parametrize(
    ("codec", "container"),
    [("libx264", "mp4"), ("libx264", "matroska"), ("libx264", "mpegts"), ("libx264", "flv"), ("mpeg4", "avi")],
)
def test_far_frames_are_sought_and_are_the_same(tmp_path, codec, container):
    """With a keyframe every 20 frames and frames that are stored in another order than shown."""
    video = Video(encoded(tmp_path / "long", codec, container, count=200, g="20", bf="2"))
    plain = [np.asarray(frame) for frame in video.read(range(200))]
    assert len(video) == len(plain) == 200
    for wanted in ([1, 70, 71, 150, 199, 198], [0, 99], [0, 100], [199]):
        for number, frame in zip(wanted, video.read(wanted), strict=True):
            assert np.array_equal(np.asarray(frame), plain[number])


@pytest.mark.parametrize(("ahead", "behind"), [(50, 0), (0, 50), (50, 30)])
def test_frames_that_a_file_holds_and_does_not_show_have_no_number(tmp_path, ahead, behind):
    """As after a cut that encodes nothing again: the file says from when to when it is shown."""
    plain, cut = tmp_path / "plain.mp4", tmp_path / "cut.mp4"
    whole = Video(encoded(plain, "libx264", "mp4", count=200, g="20", bf="2")).read(range(200))
    data = bytearray(plain.read_bytes())
    place = data.index(b"elst") + 12
    duration, start = struct.unpack_from(">Ii", data, place)
    with av.open(str(plain)) as film:
        tick = round(1 / film.streams.video[0].average_rate / film.streams.video[0].time_base)
    struct.pack_into(">Ii", data, place, duration * (200 - ahead - behind) // 200, start + ahead * tick)
    cut.write_bytes(data)
    video, shown = Video(cut), whole[ahead : 200 - behind]
    assert len(video) == len(shown)
    for wanted in (range(len(shown)), [0, 10], [10, 90], [0, len(shown) - 1]):
        for number, frame in zip(wanted, video.read(wanted), strict=True):
            assert np.array_equal(np.asarray(frame), np.asarray(shown[number]))


@pytest.mark.parametrize(
    ("codec", "container"), [("libvpx-vp9", "webm"), ("mpeg4", "avi"), ("libx264", "matroska"), ("libx265", "mp4")]
)
def test_other_formats(tmp_path, codec, container):
    video = Video(encoded(tmp_path / f"film.{container}", codec, container))
    assert len(video) == COUNT and numbers(video, [0, 14, 29]) == [0, 14, 29]


def test_frames_of_a_variable_rate_are_counted_not_timed(tmp_path):
    times = [number * 40 if number < 10 else 400 + (number - 10) * 200 for number in range(COUNT)]
    video = Video(encoded(tmp_path / "variable.mp4", "libx264", "mp4", times))
    assert len(video) == COUNT and numbers(video, [5, 12, 28]) == [5, 12, 28]


def test_frames_are_turned_as_the_file_says(film, tmp_path):
    """A phone that is held upright stores lying frames, and a matrix that turns them by 90 degrees clockwise."""
    data = bytearray(film.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(data)
    plain, frame = (Video(path).read([4])[0] for path in (film, turned))
    assert frame.size == (48, 64)
    assert np.array_equal(np.asarray(frame), np.rot90(np.asarray(plain), -1))


def sound(path):
    with av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def broken(kind, film, path):
    data = film.read_bytes()
    if kind == "missing":
        return
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("no video\n" * 100)
    elif kind == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "picture":
        Image.new("RGB", (8, 8)).save(path, format="png")
    elif kind == "sound":
        sound(path)
    elif kind == "codec":
        path.write_bytes(data.replace(b"avc1", b"xvc9"))
    elif kind == "list":
        path.write_text(f"ffconcat version 1.0\nfile {film}\n")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "no such video file"),
        ("empty", "cannot be opened"),
        ("text", "cannot be opened"),
        ("cut", "cannot be opened"),
        ("picture", "cannot be opened"),
        ("list", "cannot be opened"),
        ("sound", "no pictures, only sound"),
        ("codec", "cannot decode its pictures"),
    ],
)
def test_broken_files_are_named(film, tmp_path, kind, message):
    path = tmp_path / "broken.mp4"
    broken(kind, film, path)
    with pytest.raises(DataError, match=message) as caught:
        Video(path).load()
    assert "broken.mp4" in str(caught.value)


def small(path, container, codec):
    """Eight frames in a file of any kind."""
    with av.open(str(path), "w", format=container) as out:
        stream = out.add_stream(codec, rate=12)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for frame in frames_of(8):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        out.mux(stream.encode(None))


def test_a_file_that_is_damaged_where_frames_are_counted_is_named(tmp_path, monkeypatch):
    def shown(container, stream):
        raise av.error.InvalidDataError(1094995529, "Invalid data found when processing input")

    small(tmp_path / "film.mkv", "matroska", "libx264")
    monkeypatch.setattr("dyntune.data.video_files._shown", shown)
    with pytest.raises(DataError, match=r"film\.mkv: cannot be read as a video \(.*Invalid data"):
        Video(tmp_path / "film.mkv").about()


def test_a_file_that_announces_any_number_of_frames_takes_no_memory(tmp_path):
    path = tmp_path / "much.avi"
    small(path, "avi", "mpeg4")
    data, many = bytearray(path.read_bytes()), (3_000_000).to_bytes(4, "little")
    for head, place in ((b"avih", 24), (b"strh", 40)):
        start = data.index(head) + place
        data[start : start + 4] = many
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="stops after 8 of 3000000 frames"):
            Video(path).load()
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def noisy(path, count):
    """A file whose frames take about the same room each, with its index in front of them; its bytes."""
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=12, options={"g": "5", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for _ in range(count):
            pixels = noise.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode(None))
    return path.read_bytes()


def test_a_file_that_stops_early_gives_the_frames_it_has(film, tmp_path):
    path = tmp_path / "short.mp4"
    data = noisy(tmp_path / "plain.mp4", COUNT)
    path.write_bytes(data[: len(data) // 2])
    video = Video(path)
    assert len(video) == COUNT and len(video.read([0, 4])) == 2
    with pytest.raises(DataError, match=r"stops after \d+ of 30 frames"):
        video.load()


def test_one_frame_is_a_video(tmp_path):
    write_video(tmp_path / "one.mp4", frames_of(1))
    clip = build_transform(preprocessing(Sampling(4, 2)))(Video(tmp_path / "one.mp4"))
    assert clip.shape == (4, 3, 32, 32) and torch.equal(clip[0], clip[3])


def preprocessing(clip, size=32):
    return Preprocessing((size, size), (0.5,) * 3, (0.5,) * 3, "bicubic", clip)


@pytest.mark.parametrize("sampling", ["spans", "segments"])
def test_indices_of_videos_of_any_length(sampling):
    for frames, stride in ((1, 1), (4, 3), (8, 16)):
        plan = Sampling(frames, stride, sampling)
        for count in range(1, 300):
            for one in (plan.training_indices(count), *plan.test_indices(count)):
                assert len(one) == frames and one == sorted(one) and set(one) <= set(range(count))


def test_indices_are_those_that_are_written():
    assert Sampling(3, 4).test_indices(29) == [[10, 14, 18]]
    assert Sampling(3, 4, spans=3).test_indices(29) == [[0, 4, 8], [10, 14, 18], [20, 24, 28]]
    assert Sampling(3, 4).test_indices(6) == [[0, 4, 5]]
    assert Sampling(4, sampling="segments").test_indices(41) == [[5, 15, 25, 35]]
    starts = {Sampling(3, 4).training_indices(12)[0] for _ in range(200)}
    assert starts == {0, 1, 2, 3}
    drawn = [Sampling(2, sampling="segments").training_indices(5) for _ in range(200)]
    assert {one[0] for one in drawn} == {0, 1, 2} and {one[1] for one in drawn} == {2, 3, 4}


class Drawn:
    """Frames without a file: one coloured gradient for all of them."""

    def __init__(self, width, height, count=40):
        self.count = count
        across = np.linspace(0, 255, width)[None].repeat(height, 0)
        down = np.linspace(0, 255, height)[:, None].repeat(width, 1)
        self.frame = Image.fromarray(np.stack([across, down, across], 2).astype(np.uint8))

    def __len__(self):
        return self.count

    def read(self, indices, change):
        return [change(self.frame) for _ in indices]


def test_views_of_a_test():
    transform = build_transform(preprocessing(Sampling(2, 4, spans=2, crops=3)), every_view=True)
    views = transform(Drawn(64, 32))
    assert views.shape == (6, 2, 3, 32, 32)
    means = views[:3, 0, 0].mean((1, 2))
    assert means[0] < -0.3 < means[1] < 0.3 < means[2] and torch.equal(views[:3], views[3:])
    assert torch.equal(build_transform(preprocessing(Sampling(2, 4, crops=3)))(Drawn(64, 32)), views[1])
    tall = transform(Drawn(32, 64))
    assert tall[0, 0, 1].mean() < -0.3 and tall[2, 0, 1].mean() > 0.3


@pytest.mark.parametrize("augment", ["none", "timm"])
def test_all_frames_of_a_training_clip_are_changed_alike(augment):
    torch.manual_seed(0)
    transform = build_transform(preprocessing(Sampling(3, 2)), train=True, augment=augment)
    clips = [transform(Drawn(80, 48)) for _ in range(12)]
    assert all(torch.equal(clip[0], clip[1]) and torch.equal(clip[0], clip[2]) for clip in clips)
    assert len({float(clip.mean()) for clip in clips}) > 6
    slopes = [float(clip[0, 0, :, -8:].mean() - clip[0, 0, :, :8].mean()) for clip in clips]
    assert min(slopes) < 0 < max(slopes)  # some are mirrored
    still = build_transform(preprocessing(Sampling(3, 2, flip=0)), train=True, augment=augment)
    assert all(clip[0, 0, :, -8:].mean() > clip[0, 0, :, :8].mean() for clip in (still(Drawn(80, 48)),) * 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 0}, "frames=0"),
        ({"sampling": "random"}, "unknown sampling"),
        ({"average": "votes"}, "unknown average"),
        ({"crops": 2}, "crops=2"),
        ({"spans": 2, "sampling": "segments"}, "cover the whole video"),
    ],
)
def test_samplings_that_are_refused(changes, message):
    with pytest.raises(DataError, match=message):
        Sampling(**changes)


def test_sampling_is_saved_with_the_preprocessing():
    given = preprocessing(Sampling(4, 3, spans=2, average="logits"))
    assert Preprocessing.from_dict(given.to_dict()) == given
    assert "clip" not in preprocessing(None).to_dict()
    for wrong in ({"frames": "8"}, {"frame": 8}, {"flip": True}, {"frames": 10**9}, {"scale": float("inf")}):
        with pytest.raises(DataError, match="sampling of clips"):
            Preprocessing.from_dict(given.to_dict() | {"clip": given.clip.to_dict() | wrong})


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Two classes of films; one of them is a folder of frames."""
    root = tmp_path_factory.mktemp("classes")
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for label in ("down", "up"):
            for number in range(count):
                write_video(root / split / label / f"{number}.mp4", frames_of(8))
    folder = root / "train" / "up" / "as_frames"
    folder.mkdir()
    for number, frame in enumerate(frames_of(5)):
        Image.fromarray(frame).save(folder / f"{number:03}.png")
    return root


def test_a_folder_of_videos(films):
    data = load_data(f"video-folder:{films}")
    assert data.classes == ("down", "up") and [len(s) for s in (data.train, data.val, data.test)] == [9, 4, 4]
    assert [len(data.train.read(index)) for index in range(9)] == [8] * 8 + [5]
    assert [np.asarray(f).mean() for f in data.train.read(8).read([0, 4])] == [2.5, 34.5]
    clip, label = data.train.with_transform(build_transform(preprocessing(Sampling(2))))[8]
    assert clip.shape == (2, 3, 32, 32) and label == 1


def named(data):
    return {data.source(index) for index in range(len(data))}


def test_videos_that_are_added_move_no_other(tmp_path):
    def fill(numbers):
        for label in ("cat", "dog"):
            (tmp_path / label).mkdir(exist_ok=True)
            for number in numbers:
                (tmp_path / label / f"{number}.mp4").write_bytes(b"")

    fill(range(15))
    before = load_data(f"video-folder:{tmp_path}")
    fill(range(15, 30))
    after = load_data(f"video-folder:{tmp_path}")
    assert all(named(getattr(before, split)) < named(getattr(after, split)) for split in ("train", "test"))


def test_splits_have_other_names_and_may_stand_alone(films, tmp_path, caplog):
    (tmp_path / "inner").mkdir()
    for ours, theirs in (("train", "Training"), ("val", "dev"), ("test", "test_videos")):
        (tmp_path / "inner" / theirs).symlink_to(films / ours)
    data = load_data(f"video-folder:{tmp_path}")
    assert [len(split) for split in (data.train, data.val, data.test)] == [9, 4, 4]
    (tmp_path / "inner" / "Training").unlink()
    (tmp_path / "inner" / "dev").unlink()
    held = load_held(f"video-folder:{tmp_path / 'inner'}", classes=["down", "side", "up"])
    assert [*held.splits] == ["test"] and held.splits["test"].targets == (0, 0, 2, 2) and held.all.videos
    assert "there are no videos of 1 class: 'side'" in caplog.text


def test_videos_are_known_by_their_content(films, tmp_path):
    data = load_data(f"video-folder:{films}").train
    shutil.copytree(films / "train", tmp_path / "there")
    other = load_data(f"video-folder:{tmp_path / 'there'}", val_fraction=0.1)
    moved = {each.identity(i) for each in (other.train, other.val, other.test) for i in range(len(each))}
    assert {data.identity(index) for index in range(9)} == moved
    assert data.identity(8) != data.identity(7)  # a folder of frames, and a file


def test_class_folders_alone_are_split(films):
    data = load_data(f"video-folder:{films / 'train'}")
    assert data.classes == ("down", "up") and all(map(len, (data.train, data.val, data.test)))


def test_bad_videos_are_left_out_and_named(films, tmp_path):
    for label in ("down", "up"):
        for number in range(6):
            write_video(tmp_path / label / f"{number}.mp4", frames_of(4))
    (tmp_path / "up" / "bad.mp4").write_bytes(b"nothing")
    data = load_data(f"video-folder:{tmp_path}", on_corrupt="skip")
    assert [name for name in data.skipped if name.endswith("bad.mp4")] == [*data.skipped] and data.skipped


@pytest.mark.parametrize("zeros", [False, True])
def test_frames_whose_names_are_in_another_order_than_their_numbers_are_told_of_once(tmp_path, caplog, zeros):
    for label in ("down", "up"):
        for video in range(5):
            folder = tmp_path / label / f"v{video}"
            folder.mkdir(parents=True)
            for number in range(1, 12):
                name = f"frame{number:02}" if zeros else f"frame{number}"
                Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{name}.png")
    data = load_data(f"video-folder:{tmp_path}")
    said = [record.getMessage() for record in caplog.records if "order of their names" in record.getMessage()]
    assert len(said) == (not zeros) and all("frame11.png before frame2.png" in line for line in said)
    order = [1, 2, 3, 4] if zeros else [1, 10, 11, 2]
    assert [frame.getpixel((0, 0))[0] for frame in data.train.read(0).read(range(4))] == order
    caplog.clear()
    expand_videos([str(tmp_path)])
    assert caplog.text.count("order of their names") == (not zeros)


def test_videos_that_are_damaged_in_between_are_left_out(tmp_path):
    """A hole, as an unfinished download leaves it; the first and the last frame are found by seeking all the same."""
    for label in ("down", "up"):
        for split in ("train", "val"):
            write_video(tmp_path / split / label / "0.mp4", frames_of(4))
    data = noisy(tmp_path / "plain.mp4", 150)
    middle, hole = len(data) // 2, len(data) // 10
    bad = tmp_path / "train" / "up" / "bad.mp4"
    bad.write_bytes(data[:middle] + bytes(hole) + data[middle + hole :])
    assert len(Video(bad).read([0, 149])) == 2
    with pytest.raises(DataError, match="stops after"):
        Video(bad).read([80])
    frames = tmp_path / "train" / "up" / "frames"
    frames.mkdir()
    for number in range(3):
        Image.new("RGB", (8, 8)).save(frames / f"{number}.png")
    (frames / "1.png").write_bytes(b"nothing")
    assert load_data(f"video-folder:{tmp_path}", on_corrupt="skip").skipped == (str(bad), str(frames))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "no folder"),
        (lambda root: (root / "up").mkdir(parents=True), "no videos in the class folders 'up'"),
        (lambda root: (root / "val").mkdir(parents=True), "val but no train"),
        (lambda root: [(root / n).mkdir(parents=True) for n in ("train", "val", "valid")], "val and valid"),
    ],
)
def test_folders_that_are_refused(tmp_path, make, message):
    make(tmp_path / "set")
    with pytest.raises(DataError, match=message):
        load_data(f"video-folder:{tmp_path / 'set'}")


def test_a_folder_of_images_is_named_as_one(photos):
    with pytest.raises(DataError, match=r"Or give folder:"):
        load_data(f"video-folder:{photos}")


def test_lists(films, tmp_path, caplog):
    names = [f"{label}/{n}.mp4" for label in ("down", "up") for n in range(4)]
    text = "".join(f"{films}/train/{name} {name.startswith('up'):d}\n" for name in names)
    (tmp_path / "train.csv").write_text(f"# path label\n{text}\n{films}/train/up/as_frames 5 1\n")
    (tmp_path / "val.csv").write_text(f"{films}/val/up/0.mp4 1\n{films}/val/down/0.mp4 0\n")
    data = load_data(f"video-list:{tmp_path / 'train.csv'}")
    assert data.classes == ("0", "1") and data.train.targets == (0,) * 4 + (1,) * 5 and data.val.targets == (1, 0)
    assert len(data.train.read(8)) == 5 and data.test is None
    assert data.train.source(8).endswith("train.csv, line 11)")
    held = load_held(f"video-list:{tmp_path / 'val.csv'}", classes=["no", "yes", "maybe"])
    assert held.classes == ("no", "yes", "maybe") and held.splits["val"].targets == (1, 0) and not held.plain
    assert "0 is no, 2 is maybe" in caplog.text
    assert load_held(f"video-list:{tmp_path / 'val.csv'}", classes=["1", "0"]).all.targets == (0, 1)
    (tmp_path / "validation.csv").write_text(f"{films}/val/up/0.mp4 1\n")
    with pytest.raises(DataError, match=r"val\.csv and validation\.csv: expected one val list"):
        load_data(f"video-list:{tmp_path / 'train.csv'}")


def test_lists_that_count_from_one(films, caplog):
    lines = [f"train/{label}/{n}.mp4 {label.startswith('up') + 1:d}" for n in range(3) for label in ("up", "down")]
    (films / "from_one.txt").write_text("\n".join(lines))
    data = load_data(f"video-list:{films / 'from_one.txt'}")
    assert data.classes == ("1", "2") and sum(data.train.targets) + sum(data.val.targets) == 3
    assert "the lowest label is 1" in caplog.text
    held = load_held(f"video-list:{films / 'from_one.txt'}", classes=["down", "up"])
    assert held.all.targets == (1, 0) * 3 and "1 is down, 2 is up" in caplog.text


def test_lists_of_names_relative_to_them(films):
    lines = [f"train/{label}/{n}.mp4,{label}" for n in range(3) for label in ("up", "down")]
    (films / "some.txt").write_text("\n".join(lines))
    data = load_data(f"video-list:{films / 'some.txt'}")
    assert data.classes == ("down", "up") and len(data.train.read(0)) == 8
    before = {data.val.source(index).split()[0] for index in range(len(data.val))}
    (films / "some.txt").write_text("\n".join([f"train/up/{n}.mp4,up" for n in (3,)] + lines))
    data = load_data(f"video-list:{films / 'some.txt'}")
    assert before <= {data.val.source(index).split()[0] for index in range(len(data.val))}


def test_lists_begin_and_separate_as_programs_write_them(films):
    (films / "tabs.txt").write_text(
        f"train/up/0.mp4\t1\ntrain/up/as_frames\t5 \t1\n{films}/train/down/0.mp4 \t0\ntrain/down/../down/1.mp4\t0\n",
        encoding="utf-8-sig",
    )
    held = load_held(f"video-list:{films / 'tabs.txt'}").splits["test"]
    assert held.targets == (1, 1, 0, 0) and [len(held.read(index)) for index in (0, 1, 2, 3)] == [8, 5, 8, 8]


def test_quotes_of_csv_are_undone(films):
    lines = ['"train/up/0.mp4",up', 'train/down/../down/0.mp4, "going, down"', '"train/up/as_frames",5,"up"']
    (films / "quoted.csv").write_text("\n".join(lines))
    held = load_held(f"video-list:{films / 'quoted.csv'}")
    assert held.classes == ("going, down", "up") and held.all.targets == (1, 0, 1)
    assert [len(held.all.read(index)) for index in range(3)] == [8, 8, 5]


def test_a_comma_of_a_path_is_no_separator(films):
    shutil.copytree(films / "train/up/as_frames", films / "up, then down")
    shutil.copy(films / "train/up/0.mp4", films / "one,two.mp4")
    (films / "blanks.txt").write_text("one,two.mp4 1\nup, then down 5 1\nup, then down\t0\ntrain/down/0.mp4,0\n")
    held = load_held(f"video-list:{films / 'blanks.txt'}").all
    assert held.targets == (1, 1, 0, 0) and [len(held.read(index)) for index in range(4)] == [8, 5, 5, 8]


@pytest.mark.parametrize("header", ["path,label", "video label", '"path","label"'])
def test_a_header_of_a_list_is_no_video(films, header):
    lines = [f"train/{label}/{n}.mp4,{label}" for n in range(3) for label in ("up", "down")]
    (films / "headed.csv").write_text("\n".join(["# made by hand", header, *lines]))
    with pytest.raises(DataError, match=r"headed\.csv, line 2 looks like a header"):
        load_data(f"video-list:{films / 'headed.csv'}", on_corrupt="skip")
    (films / "headed.csv").write_text("\n".join(["train/up/gone.mp4,up", *lines]))
    assert load_data(f"video-list:{films / 'headed.csv'}", on_corrupt="skip").skipped


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.mp4\n", "line 1: 'a.mp4' has no label"),
        ("a.mp4 0\nb.mp4 up\n", "line 2: its label is a name"),
        ("", "no lines"),
        ("a.mp4 1523000\n", "highest label is 1523000"),
    ],
)
def test_lists_that_are_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(f"video-list:{tmp_path / 'list.txt'}")


def test_arguments_of_commands(films, film):
    assert expand_videos([str(film), str(films / "val" / "up" / "*.mp4")])[0] == film
    assert expand_videos([str(films / "train" / "up" / "as_frames")]) == [films / "train" / "up" / "as_frames"]
    assert len(expand_videos([str(films / "train")])) == 9 == len(list_videos(films / "train"))
    with pytest.raises(DataError, match="no videos behind"):
        expand_videos(["nowhere*"])


def _length(video):
    return len(video), numbers(video, [2])


def test_a_video_goes_into_other_processes(film):
    video = Video(film)
    assert len(pickle.loads(pickle.dumps(video))) == COUNT
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_length, (video,)) == (COUNT, [2])


def test_what_is_kept_of_each_frame_is_all_that_is_kept(tmp_path):
    """Reading frames of a large file one by one leaves no whole frame behind."""
    import gc

    path = tmp_path / "large.mp4"
    write_video(path, frames_of(12, 480, 640))
    alive = []

    def change(frame):
        gc.collect()
        alive.append(sum(isinstance(o, Image.Image) and o.size == (640, 480) for o in gc.get_objects()))
        return frame.resize((8, 8))

    assert [frame.size for frame in Video(path).read(range(12), change)] == [(8, 8)] * 12
    assert max(alive) <= min(alive) + 1


@pytest.fixture
def torchcodec(monkeypatch, film):
    """Has frames decoded by torchcodec, where that works."""
    decoders = pytest.importorskip("torchcodec.decoders")
    try:
        decoders.VideoDecoder(str(film))
    except (RuntimeError, OSError):
        pytest.skip("torchcodec does not find FFmpeg's libraries")
    return lambda on: monkeypatch.setenv("DYNTUNE_DECODER", "torchcodec" if on else "pyav")


def test_torchcodec_gives_the_same_frames(torchcodec, film, tmp_path):
    data = bytearray(film.read_bytes())
    place = data.index(b"tkhd") + 4 + 40
    data[place : place + 36] = struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
    long = encoded(tmp_path / "long.mp4", "libx264", "mp4", count=200, g="20", bf="2")
    for source, wanted in ((film, [3, 0, 29]), (bytes(data), [4]), (long, [150, 1, 199])):
        read = {}
        for on in (False, True):
            torchcodec(on)
            read[on] = Video(source).read(wanted)
        assert all(np.array_equal(*map(np.asarray, pair)) for pair in zip(*read.values(), strict=True))
        Video(source).load()


def test_a_decoder_that_does_not_work_or_does_not_exist_is_named(monkeypatch, film):
    monkeypatch.setitem(__import__("sys").modules, "torchcodec", None)
    monkeypatch.setenv("DYNTUNE_DECODER", "torchcodec")
    for read in (lambda: Video(film).read([0]), Video(film).load):
        with pytest.raises(DataError, match="is torchcodec, which does not work here"):
            read()
    monkeypatch.setenv("DYNTUNE_DECODER", "torchcodek")
    with pytest.raises(DataError, match="torchcodec"):
        Video(film).read([0])


def test_without_pyav_the_extra_is_named(monkeypatch, film):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(DataError, match=r"pip install av, "):
        about(film, "film")
