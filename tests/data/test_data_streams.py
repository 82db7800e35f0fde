"""Data sets that are read from front to back: WebDataset shards, and TensorFlow data sets as far as timm gives them."""

import io
import json
import pickle
import tarfile
import types

import pytest
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import load_data
from dyntune.data import streams as streams_module


def png(colour, size=(8, 8), **settings):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG", **settings)
    return buffer.getvalue()


def write_shard(path, samples):
    """A WebDataset shard: for each sample its files, named KEY.SUFFIX, one after another."""
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def shard_samples(first, count):
    return {f"{i:04d}": {"png": png((i, 7, 9)), "cls": str(i % 2).encode()} for i in range(first, first + count)}


@pytest.mark.parametrize("info", [False, True])
def test_web_dataset_shards_are_read_whole_and_once(tmp_path, info):
    write_shard(tmp_path / "train-0.tar", shard_samples(0, 6))
    write_shard(tmp_path / "train-1.tar", shard_samples(6, 4))
    write_shard(tmp_path / "val-0.tar", shard_samples(20, 3))
    if info:
        shards = {"train": {"train-0.tar": 6, "train-1.tar": 4}, "validation": {"val-0.tar": 3}}
        entries = {
            split: {
                "name": split,
                "filenames": list(files),
                "shard_lengths": list(files.values()),
                "num_samples": sum(files.values()),
            }
            for split, files in shards.items()
        }
        (tmp_path / "_info.json").write_text(json.dumps({"splits": entries}))
    splits = load_data(f"wds/{tmp_path}")
    assert [image.getpixel((3, 3)) for image, _ in splits.train] == [(i, 7, 9) for i in range(10)]
    assert splits.train.targets == tuple(i % 2 for i in range(10))
    assert [image.getpixel((0, 0))[0] for image, _ in splits.val] == [20, 21, 22]
    assert splits.test is None and splits.classes == ("0", "1")
    assert pickle.loads(pickle.dumps(splits.val))[0][1] == 0


def test_samples_that_are_added_to_shards_move_no_other_to_another_split(tmp_path):
    def validated(first):
        write_shard(tmp_path / "train-0.tar", shard_samples(first, 40 - first))
        splits = load_data(f"wds/{tmp_path}")
        return [{image.getpixel((0, 0))[0] for image, _ in part} for part in (splits.train, splits.val)]

    before, after = validated(10), validated(0)
    assert before[0] <= after[0] and before[1] <= after[1] and len(after[0] | after[1]) == 40
    assert 0 < len(before[1]) < 10


def test_shards_of_no_split_beside_others_are_left_out_and_said(tmp_path, caplog):
    write_shard(tmp_path / "flowers-train-0.tar", shard_samples(0, 6))
    write_shard(tmp_path / "flowers-holdout-0.tar", shard_samples(6, 4))
    splits = load_data(f"wds/{tmp_path}")
    assert len(splits.train) + len(splits.val) == 6 and "1 shards of no split, such as flowers-holdout" in caplog.text
    caplog.clear()
    (tmp_path / "flowers-train-0.tar").unlink()
    splits = load_data(f"wds/{tmp_path}")
    assert len(splits.train) + len(splits.val) == 4
    write_shard(tmp_path / "flowers-val-0.tar", shard_samples(10, 2))
    splits = load_data(f"wds/{tmp_path}")
    assert (len(splits.train), len(splits.val)) == (4, 2) and "of no split" not in caplog.text


def test_bad_samples_are_counted_once_where_validation_images_are_split_off(tmp_path):
    samples = shard_samples(0, 12)
    samples["0003"]["png"] = b"nothing"
    write_shard(tmp_path / "train-0.tar", samples)
    splits = load_data(f"wds/{tmp_path}", on_corrupt="skip")
    assert len(splits.train) + len(splits.val) == 11
    assert splits.skipped == (f"{tmp_path / 'train-0.tar'}: 0003.png",)


def test_bad_samples_of_a_shard_are_named_or_skipped(tmp_path):
    samples = shard_samples(0, 8)
    samples["0003"]["png"] = samples["0003"]["png"][:50]
    del samples["0005"]["cls"]
    write_shard(tmp_path / "train-0.tar", samples)
    write_shard(tmp_path / "val-0.tar", shard_samples(8, 2))
    with pytest.raises(DataError, match=r"2 samples cannot be read.*train-0\.tar: 0003\.png"):
        load_data(f"wds/{tmp_path}")
    splits = load_data(f"wds/{tmp_path}", on_corrupt="skip")
    assert [image.getpixel((0, 0))[0] for image, _ in splits.train] == [0, 1, 2, 4, 6, 7]
    assert len(splits.skipped) == 2 and splits.skipped[0] == f"{tmp_path / 'train-0.tar'}: 0003.png"


@pytest.mark.parametrize("cut", ["in an image", "between two samples", "in a header", "a bit of a header", "empty"])
def test_a_shard_that_was_cut_is_refused(tmp_path, cut, caplog):
    write_shard(tmp_path / "train-0.tar", shard_samples(0, 6))
    write_shard(tmp_path / "val-0.tar", shard_samples(8, 2))
    shard = tmp_path / "train-0.tar"
    whole = bytearray(shard.read_bytes())
    if cut == "a bit of a header":
        whole[6 * 1024 + 150] ^= 1
    ends = {"in an image": 7 * 1024 + 600, "between two samples": 8 * 1024, "in a header": 8 * 1024 + 100, "empty": 0}
    shard.write_bytes(whole[: ends.get(cut)])
    with pytest.raises(DataError, match=r"train-0\.tar is cut off or damaged"):
        load_data(f"wds/{tmp_path}")
    if cut != "empty":
        splits = load_data(f"wds/{tmp_path}", on_corrupt="skip")
        assert 0 < len(splits.train) < 6 and "train-0.tar is cut off" in caplog.text


def test_info_files_need_to_say_no_more_than_which_shards_there_are(tmp_path, caplog):
    write_shard(tmp_path / "a.tar", shard_samples(0, 6))
    info = tmp_path / "info.json"
    info.write_text(json.dumps({"splits": {"train": {"filenames": ["a.tar"]}}}))
    splits = load_data(f"wds/{tmp_path}")
    assert len(splits.train) + len(splits.val) == 6
    info.write_text(json.dumps({"splits": {"train": {"filenames": ["a.tar"]}, "test": {"filenames": []}}}))
    with pytest.raises(DataError, match="'test' has no filenames"):
        load_data(f"wds/{tmp_path}")
    info.unlink()
    load_data(f"wds/{tmp_path}")
    assert "info file not found" not in caplog.text


def test_labels_that_are_numbers_of_something_else_are_refused(tmp_path):
    samples = shard_samples(0, 6)
    samples["0003"]["cls"] = b"20000000"
    write_shard(tmp_path / "train-0.tar", samples)
    with pytest.raises(DataError, match="the highest label is 20000000, of 3 labels that differ"):
        load_data(f"wds/{tmp_path}")


def test_shards_that_hold_other_than_their_info_file_says_are_refused(tmp_path):
    write_shard(tmp_path / "a.tar", shard_samples(0, 6))
    entry = {"name": "train", "filenames": ["a.tar"], "shard_lengths": [9], "num_samples": 9}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": entry}}))
    with pytest.raises(DataError, match=r"hold 6 samples, but the info file .* says 9"):
        load_data(f"wds/{tmp_path}")


def test_shards_hold_images_of_any_suffix_in_folders_of_any_name(tmp_path):
    folder = tmp_path / "set [1] {a,b}"
    folder.mkdir()
    samples = {f"{i:04d}": {suffix: png((i, 0, 0)), "cls": b"1"} for i, suffix in enumerate(("jfif", "bmp", "avif"))}
    write_shard(folder / "Training-0.tar", samples)
    write_shard(folder / "dev-0.tar", shard_samples(20, 1))
    splits = load_data(f"wds/{folder}")
    assert len(splits.train) == 3 and len(splits.val) == 1


def test_shards_that_are_not_there_are_explained(tmp_path):
    with pytest.raises(DataError, match=r"no folder .*gone"):
        load_data(f"wds/{tmp_path}/gone")
    with pytest.raises(DataError, match="no training shards"):
        load_data(f"wds/{tmp_path}")
    with pytest.raises(DataError, match="Expected a local folder"):
        load_data(f"wds/pipe:touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


def test_streams_too_large_for_memory_are_refused(tmp_path, monkeypatch):
    write_shard(tmp_path / "train-0.tar", shard_samples(0, 8))
    monkeypatch.setattr(streams_module, "MEMORY_LIMIT", 200)
    with pytest.raises(DataError, match="unpack it into an image folder"):
        load_data(f"wds/{tmp_path}")


class FakeTfds:
    """What timm gives for a TensorFlow data set, as far as it is used."""

    def __init__(self, count):
        info = types.SimpleNamespace(splits={"train": None, "test": None, "unsupervised": None})
        self.reader = types.SimpleNamespace(
            dist_rank=1,
            dist_num_replicas=2,
            class_to_idx={"b": 1, "a": 0},
            builder=types.SimpleNamespace(info=info),
        )
        self.count = count

    def __iter__(self):
        rank, world = self.reader.dist_rank, self.reader.dist_num_replicas
        return ((Image.new("RGB", (4, 4), (i, 0, 0)), i % 2) for i in range(rank, self.count, world))


def test_tensorflow_data_sets_are_read_whole_in_every_process(tmp_path, monkeypatch):
    asked = []

    def create_dataset(name, *, root, split, download=False):
        asked.append((name, root, split))
        return FakeTfds({"train": 10, "test": 4}[split])

    monkeypatch.setattr("timm.data.create_dataset", create_dataset)
    splits = load_data("tfds/some", root=tmp_path)
    assert asked == [("tfds/some", str(tmp_path), "train"), ("tfds/some", str(tmp_path), "test")]
    assert len(splits.train) + len(splits.val) == 10 and len(splits.val) > 0 and len(splits.test) == 4
    assert splits.classes == ("a", "b")
    assert [image.getpixel((0, 0))[0] for image, _ in splits.test] == [0, 1, 2, 3]


def test_tensorflow_data_sets_need_their_library(tmp_path, monkeypatch):
    def missing(name, **settings):
        raise ModuleNotFoundError("No module named 'tensorflow'")

    monkeypatch.setattr("timm.data.create_dataset", missing)
    with pytest.raises(DataError, match="install tensorflow-datasets"):
        load_data("tfds/some", root=tmp_path)
