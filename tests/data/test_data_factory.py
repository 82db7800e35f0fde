"""torchvision and Hugging Face data sets through timm's factory, on small files in their real formats."""

import hashlib
import io
import pickle
import struct
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from filelock import FileLock, Timeout
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import load_data

RNG = np.random.default_rng(0)


def png(colour, size=(8, 8), **settings):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG", **settings)
    return buffer.getvalue()


def write_mnist(root, train=40, test=12):
    """MNIST's idx files as they are after unpacking; labels go 0, 1, ... 9, 0, ..."""
    raw = root / "MNIST/raw"
    raw.mkdir(parents=True)
    written = {}
    for word, count in (("train", train), ("t10k", test)):
        images = RNG.integers(0, 256, (count, 28, 28), np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{word}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 0x803, *images.shape) + images.tobytes())
        (raw / f"{word}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        written[word] = images
    return written


def test_torchvision_files_that_are_there_are_read_and_val_is_split_off_train(tmp_path):
    images = write_mnist(tmp_path)
    splits = load_data("torch/mnist", root=tmp_path, val_fraction=0.25)
    assert [len(part) for part in (splits.train, splits.val, splits.test)] == [30, 10, 12]
    assert sorted(splits.val.targets) == list(range(10)) and len(splits.classes) == 10
    assert splits.test.targets == tuple(i % 10 for i in range(12))
    for index in range(12):
        image, label = splits.test[index]
        assert (np.asarray(image) == images["t10k"][index][..., None]).all() and label == index % 10
    both = sorted(np.asarray(image)[..., 0].tobytes() for part in (splits.train, splits.val) for image, _ in part)
    assert both == sorted(image.tobytes() for image in images["train"])
    assert len(pickle.loads(pickle.dumps(splits.train))) == 30


def test_the_folder_can_be_named_in_the_environment(tmp_path, monkeypatch):
    write_mnist(tmp_path)
    monkeypatch.setenv("DYNTUNE_DATA", str(tmp_path))
    assert len(load_data("torch/mnist").test) == 12


def test_without_a_network_the_error_says_where_the_files_go(tmp_path, monkeypatch):
    def unreachable(*args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unreachable)
    with pytest.raises(DataError) as raised:
        load_data("torch/cifar100", root=tmp_path)
    message = str(raised.value)
    assert "could not be downloaded" in message and "cifar-100-python/" in message and str(tmp_path) in message
    with pytest.raises(DataError, match="Did you mean 'torch/cifar100'"):
        load_data("torch/cifar1000", root=tmp_path)


def hub_folder(root, splits):
    """A local data set as Hugging Face's ``datasets`` lays them out: parquet files with embedded images."""
    import datasets

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["owl", "cat"])})
    for split, (files, labels) in splits.items():
        column = [{"bytes": file, "path": f"{split}{i}.png"} for i, file in enumerate(files)]
        table = datasets.Dataset.from_dict({"img": column, "label": labels}, features=features)
        (root / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(root / "data" / f"{split}-00000-of-00001.parquet"))


def test_a_local_hugging_face_data_set_is_read(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    train = [png((i, 0, 0)) for i in range(10)]
    test = [png((0, 200, 0)), png((0, 0, 200), (8, 4), exif=turned), png("red")[:50]]
    hub_folder(tmp_path / "set", {"train": (train, [0, 1] * 5), "test": (test, [1, 0, 1])})
    name = f"hfds/{tmp_path / 'set'}"
    splits = load_data(name, root=tmp_path / "cache")
    assert splits.classes == ("owl", "cat")
    assert len(splits.test) == 3 and 0 < len(splits.val) < 5
    reds = sorted(image.getpixel((0, 0))[0] for part in (splits.train, splits.val) for image, _ in part)
    assert reds == list(range(10))
    assert all(image.getpixel((0, 0))[0] % 2 == label for image, label in splits.train)
    assert splits.test.targets == (1, 0, 1)
    assert pickle.loads(pickle.dumps(splits.test))[0][0].getpixel((0, 0)) == (0, 200, 0)
    assert splits.test[1][0].size == (4, 8)
    with pytest.raises(DataError, match=r"test image 2 \(test2\.png\)"):
        splits.test[2]

    skipping = load_data(name, root=tmp_path / "cache", on_corrupt="skip")
    assert skipping.test.targets == (1, 0) and len(skipping.skipped) == 1 and "test2.png" in skipping.skipped[0]


def test_a_hugging_face_data_set_may_have_capitals_in_its_path(tmp_path):
    """With every timm that is allowed: 1.0.26 writes the names of data sets in small letters."""
    for label in ("Cat", "Owl"):
        (tmp_path / "MySet" / "train" / label).mkdir(parents=True)
        for number in range(4):
            (tmp_path / "MySet" / "train" / label / f"{number}.png").write_bytes(png((number, 0, len(label))))
    data = load_data(f"hfds/{tmp_path / 'MySet'}", root=tmp_path / "cache")
    assert data.classes == ("Cat", "Owl") and len(data.train) + len(data.val) == 8
    assert "MySet/train/Cat/0.png" in data.train.source(0)
    content = (tmp_path / "MySet/train/Cat/0.png").read_bytes()
    # As it was in runs that began before; it says which split an image is in.
    assert data.train.identity(0) == hashlib.blake2b(content, digest_size=8).hexdigest()


def test_rows_that_are_added_to_a_hugging_face_data_set_move_no_other_to_another_split(tmp_path):
    def parts(first, folder):
        hub_folder(
            tmp_path / folder,
            {"train": ([png((i, 0, 0)) for i in range(first, 40)], [i % 2 for i in range(first, 40)])},
        )
        splits = load_data(f"hfds/{tmp_path / folder}", root=tmp_path / "cache")
        return [{image.getpixel((0, 0))[0] for image, _ in part} for part in (splits.train, splits.val)]

    before, after = parts(10, "before"), parts(0, "after")
    assert before[0] <= after[0] and before[1] <= after[1] and len(after[0] | after[1]) == 40


def test_fine_labels_are_preferred_and_a_test_split_without_labels_is_none(tmp_path):
    import datasets

    features = datasets.Features(
        {
            "coarse": datasets.ClassLabel(names=["animal", "thing"]),
            "picture": datasets.Image(),
            "fine": datasets.ClassLabel(names=["owl", "cat", "cup"]),
        }
    )
    (tmp_path / "set").mkdir()
    for split, fine in (("train", [0, 1, 2, 2, 1, 0]), ("test", [-1, -1])):
        column = [{"bytes": png((label + 1, 0, 0)), "path": None} for label in fine]
        rows = {"coarse": [0] * len(fine), "picture": column, "fine": fine}
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / f"set/{split}.parquet"))
    splits = load_data(f"hfds/{tmp_path / 'set'}", root=tmp_path / "cache")
    assert splits.classes == ("owl", "cat", "cup") and splits.test is None
    assert all(image.getpixel((0, 0)) == (label + 1, 0, 0) for image, label in splits.train)
    with pytest.raises(DataError, match="none holds labels"):
        unlabelled = datasets.Dataset.from_dict({"picture": column}).cast_column("picture", datasets.Image())
        (tmp_path / "other").mkdir()
        unlabelled.to_parquet(str(tmp_path / "other/train.parquet"))
        load_data(f"hfds/{tmp_path / 'other'}", root=tmp_path / "cache")


def test_a_hugging_face_data_set_that_cannot_be_had_is_explained(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"hfds/nobody/nothing: cannot be loaded.*without a network"):
        load_data("hfds/nobody/nothing", root=tmp_path)


def test_one_process_at_a_time_downloads(tmp_path, monkeypatch):
    held = []

    def create(name, root, split, download):
        if download:
            other = FileLock(Path(root) / ".cifar100.lock")
            try:
                other.acquire(timeout=0)
                other.release()
                held.append(False)
            except Timeout:
                held.append(True)
        raise RuntimeError("no network")

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(DataError, match="could not be downloaded"):
        load_data("torch/cifar100", root=tmp_path)
    assert held == [True]
