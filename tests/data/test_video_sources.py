"""Videos in shards, in columns of Hugging Face's data sets, and behind Kinetics' annotations."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch

import dyntune
from dyntune.core.errors import DataError
from dyntune.data import load_data, load_held

pytest.importorskip("av")
from dyntune.data.datasets import content_digest
from dyntune.data.video_files import write_video
from dyntune.data.video_shards import ShardVideos


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Files of four frames each, whose grey level is eight times their number."""
    root = tmp_path_factory.mktemp("films")
    return [
        write_video(root / f"{number}.mp4", [np.full((32, 48, 3), 8 * number, np.uint8)] * 4) or root / f"{number}.mp4"
        for number in range(8)
    ]


def levels(data):
    return [round(float(np.asarray(data.read(index).read([3])[0]).mean()) / 8) for index in range(len(data))]


def write_shard(path, samples, mode="w"):
    with tarfile.open(path, mode) as archive:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def samples(films, numbers):
    for number in numbers:
        yield f"clips/{number:03}.mp4", films[number].read_bytes()
        yield f"clips/{number:03}.json", b"{}"
        yield f"clips/{number:03}.cls", str(number % 2).encode()


def test_shards_of_videos_are_read_where_they_lie(films, tmp_path):
    write_shard(tmp_path / "train-0.tar", samples(films, range(3)))
    write_shard(tmp_path / "train-1.tar", samples(films, range(3, 6)))
    write_shard(tmp_path / "val-0.tar", samples(films, [7]))
    data = load_data(f"wds/{tmp_path}")
    assert data.train.targets == (0, 1, 0, 1, 0, 1) and data.val.targets == (1,) and data.train.videos
    assert levels(data.train) == [0, 1, 2, 3, 4, 5] and levels(data.val) == [7]
    copy = pickle.dumps(data.train)
    assert len(copy) < 3000 and levels(pickle.loads(copy)) == levels(data.train)  # no video is carried along
    assert data.train.source(4).endswith("train-1.tar: clips/004.mp4")
    assert len({data.train.identity(index) for index in range(6)}) == 6


def test_a_video_in_a_shard_is_known_as_a_file_of_it_is(tmp_path):
    """Of a large one no more is read than its beginning, middle and end."""
    large = np.random.default_rng(0).bytes(2_000_000)
    changed = bytearray(large)
    changed[400_000] ^= 1
    contents = [large, bytes(changed), large[:-1] + bytes([large[-1] ^ 1]), large[:1000]]
    given = [(f"{n}.{kind}", part) for n, film in enumerate(contents) for kind, part in (("mp4", film), ("cls", b"0"))]
    write_shard(tmp_path / "train-0.tar", given)
    data = ShardVideos([tmp_path / "train-0.tar"])
    (tmp_path / "alone.mp4").write_bytes(large)
    (tmp_path / "short.mp4").write_bytes(large[:1000])
    first, second, third, fourth = (data.identity(index) for index in range(4))
    assert first == second == content_digest(tmp_path / "alone.mp4") and third != first
    assert fourth == content_digest(tmp_path / "short.mp4")


def test_shards_that_are_not_whole(films, tmp_path):
    good = list(samples(films, range(2)))
    write_shard(tmp_path / "train-0.tar", [*good, ("clips/9.mp4", b"nothing"), ("clips/9.cls", b"1"), *good[:1]])
    with pytest.raises(DataError, match=r"clips/000\.mp4: expected a video and its .* so it is with 1 of 4 samples"):
        load_data(f"wds/{tmp_path}")
    write_shard(tmp_path / "train-0.tar", [*good, *samples(films, range(2, 6)), ("x.mp4", b"none"), ("x.cls", b"1")])
    data = load_data(f"wds/{tmp_path}", on_corrupt="skip")
    assert [name.rpartition(": ")[2] for name in data.skipped] == ["x.mp4"]
    write_shard(tmp_path / "train-0.tar", good, "w:gz")
    with pytest.raises(DataError, match="not compressed"):
        load_data(f"wds/{tmp_path}")


def test_a_column_of_videos(films, tmp_path, make_host):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"clip": datasets.Video(), "label": datasets.ClassLabel(names=["even", "odd"])})
    given = [{"bytes": path.read_bytes(), "path": None} if n % 3 else str(path) for n, path in enumerate(films)]
    rows = datasets.Dataset.from_dict({"clip": given, "label": [n % 2 for n in range(8)]}, features=features)
    host = dyntune.ClipClassifier(make_host("plain", depth=1, num_classes=2), 2)
    model = dyntune.tune(host, "linear")
    torch.manual_seed(0)
    assert dyntune.evaluate(model, rows).images == 8
    dyntune.fit(model, rows, rows, epochs=1, batch_size=4, device="cpu")
    assert model.classes == ("even", "odd")


def test_a_folder_of_videos_of_hugging_face(films, tmp_path):
    pytest.importorskip("datasets")
    for number, film in enumerate(films):
        place = tmp_path / "set" / ("test" if number > 5 else "train") / ("odd" if number % 2 else "even")
        place.mkdir(parents=True, exist_ok=True)
        (place / film.name).write_bytes(film.read_bytes())
    (tmp_path / "set" / "train" / "odd" / "bad.mp4").write_bytes(b"nothing")
    data = load_data(f"hfds/{tmp_path / 'set'}", root=tmp_path / "cache", on_corrupt="skip")
    assert data.classes == ("even", "odd") and len(data.skipped) == 1 and data.train.videos
    assert sorted(levels(data.train) + levels(data.val)) == [0, 1, 2, 3, 4, 5] and levels(data.test) == [6, 7]
    assert all(level % 2 == label for level, label in zip(levels(data.test), data.test.targets, strict=True))


HEADER = "label,youtube_id,time_start,time_end,split\n"


@pytest.fixture
def kinetics(films, tmp_path):
    """A folder with the clips of three lists, in class folders that are called otherwise than the classes."""
    lists = {"train": range(4), "val": (4, 5), "test": (6, 7)}
    for split, numbers in lists.items():
        lines = [f'"{"air, dry" if n % 2 else "abseiling"}",-id{n}_x,{n},{n + 10},{split}\n' for n in numbers]
        (tmp_path / f"{split}.csv").write_text(HEADER + "".join(lines))
        for n in numbers:
            place = tmp_path / split / ("air_dry" if n % 2 else "abseiling") / f"-id{n}_x_{n:06}_{n + 10:06}.mp4"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(films[n].read_bytes())
    return tmp_path


def test_annotations_of_kinetics(kinetics):
    data = load_data(f"kinetics:{kinetics / 'train.csv'}")
    assert data.classes == ("abseiling", "air, dry") and data.train.targets == (0, 1, 0, 1)
    assert [levels(split) for split in (data.train, data.val, data.test)] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    (kinetics / "val.csv").rename(kinetics / "validate.csv")
    assert levels(load_data(f"kinetics:{kinetics / 'train.csv'}").val) == [4, 5]
    held = load_held(f"kinetics:{kinetics / 'validate.csv'}", classes=data.classes)
    assert held.splits["val"].targets == (0, 1) and levels(held.splits["val"]) == [4, 5]
    rows = "".join(
        (kinetics / f"{split}.csv").read_text().removeprefix(HEADER) for split in ("train", "validate", "test")
    )
    (kinetics / "all.csv").write_text(HEADER + rows.replace(",val\n", ",validate\n"))
    whole = load_data(f"kinetics:{kinetics / 'all.csv'}")
    assert [levels(split) for split in (whole.train, whole.val, whole.test)] == [[0, 1, 2, 3], [4, 5], [6, 7]]
    own = load_held(f"kinetics:{kinetics / 'all.csv'}", classes=data.classes).splits
    assert {split: levels(videos) for split, videos in own.items()} == {
        "train": [0, 1, 2, 3],
        "val": [4, 5],
        "test": [6, 7],
    }
    (kinetics / "test.csv").write_text("youtube_id,time_start,time_end,split\n-id6_x,6,16,test\n")
    assert load_data(f"kinetics:{kinetics / 'train.csv'}").test is None


def test_videos_of_kinetics_that_are_missing(kinetics):
    (kinetics / "train" / "air_dry" / "-id3_x_000003_000013.mp4").unlink()
    with pytest.raises(DataError, match=r"of 4 videos, 1 are not below .*-id3_x_000003_000013 \(.*train\.csv, line 5"):
        load_data(f"kinetics:{kinetics / 'train.csv'}")
    data = load_data(f"kinetics:{kinetics / 'train.csv'}", on_corrupt="skip")
    assert levels(data.train) == [0, 1, 2] and "line 5" in data.skipped[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "no rows"),
        ("a.mp4 0\n", "no rows|no label"),
        (f"{HEADER}abseiling,id,0,ten,train\n", "line 2: time_end is 'ten'"),
        (f"{HEADER}abseiling,,0,10,train\n", "line 2: no youtube_id"),
        ("youtube_id,time_start,time_end,split\nid,0,10,test\n", "no videos to train on"),
    ],
)
def test_annotations_that_are_refused(tmp_path, text, message):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        load_data(f"kinetics:{tmp_path / 'list.csv'}")
