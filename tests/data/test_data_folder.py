"""Image folders: layouts, labels, splits, and what is said when something is wrong."""

import os
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torch._utils import ExceptionWrapper
from torch.utils.data import DataLoader

from dyntune.core.errors import DataError
from dyntune.data import build_transform, load_data, load_held
from dyntune.data.transforms import Preprocessing


def fill(root, counts, suffix=".png"):
    """Write ``counts[folder]`` little images, each in a colour of its own, into each folder."""
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            colour = (number, len(folder), sum(map(ord, folder)) % 256)
            Image.new("RGB", (6, 4), colour).save(root / folder / f"{number:03d}{suffix}")
    return root


def paths(split):
    return {split.source(index) for index in range(len(split))}


@pytest.mark.parametrize("val_name", ["val", "valid", "validation"])
def test_split_folders_are_taken_as_they_are(tmp_path, val_name):
    fill(tmp_path, {"train/b": 3, "train/a": 2, f"{val_name}/a": 1, f"{val_name}/b": 1, "test/a": 2, "test/b": 1})
    (tmp_path / "train/a/readme.txt").write_text("not an image")
    splits = load_data(tmp_path)
    assert splits.classes == ("a", "b")
    assert splits.train.targets == (0, 0, 1, 1, 1)
    assert paths(splits.val) == {str(tmp_path / val_name / "a/000.png"), str(tmp_path / val_name / "b/000.png")}
    assert splits.test.targets == (0, 0, 1)
    for split in (splits.train, splits.val, splits.test):
        for index in range(len(split)):
            assert Path(split.source(index)).parent.name == splits.classes[split[index][1]]
    assert splits.train[2][0].getpixel((0, 0)) == (0, len("train/b"), sum(map(ord, "train/b")) % 256)


def test_missing_validation_images_are_split_off_train_only(tmp_path):
    fill(tmp_path, {"train/a": 40, "train/b": 20, "test/a": 3, "test/b": 3})
    splits = load_data(f"folder:{tmp_path}", seed=3, val_fraction=0.2)
    everything = {str(path) for path in (tmp_path / "train").rglob("*.png")}
    assert paths(splits.train) | paths(splits.val) == everything
    assert not paths(splits.train) & paths(splits.val)
    assert 4 <= len(splits.val) <= 22
    assert len(splits.test) == 6
    assert paths(load_data(tmp_path, seed=3).val) == paths(splits.val)
    assert paths(load_data(tmp_path, seed=4).val) != paths(splits.val)


def test_class_folders_alone_are_split_three_ways_with_one_test_split_for_all_seeds(tmp_path):
    fill(tmp_path, {"cat": 50, "dog": 25})
    splits = {seed: load_data(tmp_path, seed=seed) for seed in (0, 1)}
    one = splits[0]
    assert 8 <= len(one.test) <= 24 and 4 <= len(one.val) <= 22  # binomial: about 15 and 12
    assert set(one.train.targets) == {0, 1}
    parts = [paths(part) for part in (one.train, one.val, one.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 75
    assert paths(splits[1].test) == parts[2]
    assert paths(splits[1].val) != parts[1]


def test_every_class_keeps_a_training_image(tmp_path):
    fill(tmp_path, {"common": 30, "rare": 1, "twice": 2})
    splits = load_data(tmp_path, val_fraction=0.9)
    assert set(splits.train.targets) == {0, 1, 2}


def test_classes_that_differ_between_train_and_test_are_listed(tmp_path):
    fill(tmp_path, {"train/cat": 2, "train/dog": 2, "train/owl": 2, "test/cat": 1, "test/dogs": 1, "test/owl": 1})
    with pytest.raises(DataError) as raised:
        load_data(tmp_path)
    message = str(raised.value)
    assert f"{tmp_path / 'test'} lacks 'dog'" in message and f"{tmp_path / 'train'} lacks 'dogs'" in message
    assert "owl" not in message and "'cat'" not in message


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({"train/a": 2, "train/b": 0}, "no images in the class folders 'b'"),
        ({"val/a": 2}, "val but no train"),
        ({"train/a": 2, "train/c": 2, "test/a": 1, "test/b": 1, "test/c": 1}, "train lacks 'b'"),
        ({"train/a": 2, "train/b": 2, "val/a": 1}, "val lacks 'b'"),
        ({"train/a": 2, "train/b": 2, "val/a": 1, "valid/a": 1}, "val and valid"),
        ({"train/a": 2, "Training/a": 2}, "Training and train"),
        ({"train/a": 2, "train/b": 2, "dev/a": 1, "Valid/a": 1}, "Valid and dev"),
        ({}, "no class folders"),
        ({"a": 1, "b": 1}, "cannot split"),
        ({"train/a": 2, "train/b": 2, "test/a": 0, "test/b": 0}, "test split has no images"),
        ({"train/a": 2}, "one class folder, 'a', with 2 images"),
        ({"flowers": 9}, "one class folder, 'flowers', with 9 images"),
        ({"flowers/a": 3, "flowers/b": 3}, "flowers is no class folder: .* the folders 'a', 'b'.*Give .*flowers"),
        ({"cat": 3, "dog/brown": 3, "dog/grey": 3}, "dog is no class folder: .* 'brown', 'grey'"),
        ({"train": 3, "test": 3}, "'test', 'train', whose images lie in no class folders"),
        ({"cat": 3, "dog": 3, "test": 3}, "'test', whose images lie in no class folders, beside 'cat', 'dog'"),
        ({"Test": 9}, "'Test', whose images lie in no class folders"),
        ({"trainA": 3, "testA": 3, "trainB": 3, "testB": 3}, "'trainA', .* lie in no class folders"),
        ({"train_cat": 3, "train_dog": 3, "test_cat": 2, "test_dog": 2}, "'train_cat', .* lie in no class folders"),
        ({"bounding_box_train": 3, "bounding_box_test": 3, "query": 3}, "no class folders, beside 'query'"),
        ({"valid": 3, "invalid": 3}, "beside 'invalid'.*rename what is a class"),
    ],
)
def test_layouts_that_make_no_sense_are_explained(tmp_path, counts, words):
    fill(tmp_path, counts)
    with pytest.raises(DataError, match=words):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("Train", None, "Test"),
        ("Training", None, "Testing"),
        ("TRAIN", "Dev", "TEST"),
        ("training_set", "valid-set", "test_set"),
        ("seg_train/seg_train", None, "seg_test/seg_test"),
        ("flowers/train", "flowers/val", "flowers/test"),
        ("archive/flowers/Train", None, "archive/flowers/Test"),
        ("flowers_train", "flowers_val", "flowers_test"),
        ("train2017", "val2017", "test2017"),
        ("archive/01_Train", None, "archive/02_Test"),
    ],
)
def test_splits_by_other_names_and_one_level_deeper_are_splits(tmp_path, train, val, test):
    splits_of = {train: 3, test: 2} | ({val: 1} if val else {})
    fill(tmp_path, {f"{split}/{name}": count for split, count in splits_of.items() for name in ("cat", "dog")})
    (tmp_path / "__MACOSX/flowers").mkdir(parents=True)
    splits = load_data(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert paths(splits.test) == {str(path) for path in (tmp_path / test).rglob("*.png")}
    if val:
        assert paths(splits.val) == {str(path) for path in (tmp_path / val).rglob("*.png")}
    assert all(source.startswith(str(tmp_path / train)) for source in paths(splits.train) | paths(splits.val)) == (
        not val
    )


def test_a_train_among_other_vehicles_is_a_class(tmp_path):
    fill(tmp_path, {"bus": 3, "car": 3, "train": 3})
    assert load_data(tmp_path).classes == ("bus", "car", "train")


@pytest.mark.parametrize("classes", [("train_station", "test_tube"), ("x-ray train", "bus"), ("trainer1", "trainer2")])
def test_a_word_of_a_split_in_the_name_of_a_class_alone_makes_no_split(tmp_path, classes):
    fill(tmp_path, dict.fromkeys(classes, 3))
    assert load_data(tmp_path).classes == tuple(sorted(classes))


def test_images_may_lie_in_a_folder_of_their_class_that_says_nothing(tmp_path):
    fill(tmp_path, {"train/cat/images": 3, "train/dog/images": 3})  # as in Tiny ImageNet
    (tmp_path / "train/cat/cat_boxes.txt").touch()
    splits = load_data(tmp_path)
    assert splits.classes == ("cat", "dog") and len(splits.train) + len(splits.val) == 6


def test_classes_are_the_same_however_their_accents_are_written(tmp_path):
    one, other = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    fill(tmp_path, {f"train/{one}": 3, "train/tea": 3, f"test/{other}": 2, "test/tea": 1})
    splits = load_data(tmp_path)
    assert splits.classes == (one, "tea") and splits.test.targets == (0, 0, 1)
    assert load_held(tmp_path / "test", classes=[one, "tea"]).all.targets.count(0) == 2
    fill(tmp_path, {f"train/{other}": 1})
    with pytest.raises(DataError, match="differ in how their accents are written"):
        load_data(tmp_path)


def test_what_came_of_a_split_of_few_images_is_said(tmp_path, caplog):
    few, many = (
        fill(tmp_path / "few", {"cat": 4, "dog": 4, "owl": 1}),
        fill(tmp_path / "many", {"cat": 60, "dog": 60}),
    )
    splits = load_data(few)
    sizes = [len(splits.train), len(splits.val), len(splits.test)]
    assert f"of 9 images, {sizes[0]} are for training, {sizes[1]} for validation (" in caplog.text
    assert f"and {sizes[2]} for test (" in caplog.text
    absent = [name for label, name in enumerate(splits.classes) if label not in splits.val.targets]
    assert "owl" in absent and f"no validation images of {', '.join(map(repr, absent))}" in caplog.text
    caplog.clear()
    load_data(many)
    assert caplog.text == ""


def test_what_is_left_out_is_said(tmp_path, caplog):
    fill(tmp_path, {"train/cat": 2, "train/dog": 2, "extra": 1, "Test": 4})
    (tmp_path / "train/cat/notes.txt").touch()
    (tmp_path / "train/dog/film.AVI").touch()
    (tmp_path / "train/dog/readme").touch()
    (tmp_path / "train/dog/.hidden.xyz").touch()
    Image.new("RGB", (4, 4)).save(tmp_path / "train/stray.png")
    splits = load_data(tmp_path)
    assert splits.test is None and len(splits.train) + len(splits.val) == 4
    assert "left out the 4 images of Test, which lie in no class folders" in caplog.text
    assert "beside the splits: 'extra'" in caplog.text
    assert "left out 3 files that are no images which Pillow reads: 1 .txt, 1 .avi, 1 no suffix" in caplog.text
    assert "1 image that lies in no class folder, such as stray.png" in caplog.text


@pytest.mark.parametrize("place", ["pictures", "cat/pictures"])
def test_pictures_that_dyntune_drew_are_neither_a_class_nor_of_one(tmp_path, place, caplog):
    fill(tmp_path, {"cat": 3, "dog": 3})
    (tmp_path / place).mkdir()
    for name in ("tokens-1.png", "tokens-2.png", "activation.png", "activation-data.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / place / name)
    splits = load_data(tmp_path)
    assert splits.classes == ("cat", "dog")
    assert sum(len(split) for split in (splits.train, splits.val, splits.test)) == 6
    assert "drawn by dyntune" in caplog.text or "pictures that dyntune drew: 'pictures'" in caplog.text


def test_every_suffix_that_pillow_reads_is_taken(tmp_path):
    Image.init()
    written = set()
    for suffix, name in Image.registered_extensions().items():
        if name in Image.OPEN and name in Image.SAVE and name != "EPS":
            for class_name in ("a", "b"):
                (tmp_path / class_name).mkdir(exist_ok=True)
                file = tmp_path / class_name / f"image{suffix.upper()}"
                try:
                    Image.new("RGB", (32, 32), "red").save(file)
                    Image.open(file).load()
                except (OSError, ValueError, KeyError, SystemError):
                    file.unlink(missing_ok=True)
                else:
                    written.add(str(file))
    assert {Path(file).suffix for file in written} > {".JFIF", ".AVIF", ".JPE", ".JP2", ".TGA", ".ICO", ".PCX"}
    splits = load_data(tmp_path)
    assert set.union(*(paths(split) for split in (splits.train, splits.val, splits.test))) == written
    splits.map(lambda split: [image for image, _ in split] and split)


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_images_added_later_move_no_other(tmp_path, layout):
    fill(tmp_path, {layout.format(name): 20 for name in ("cat", "dog")})
    before = load_data(tmp_path)
    for name in ("cat", "dog"):
        for number in range(30):
            Image.new("RGB", (4, 4)).save(tmp_path / layout.format(name) / f"{number * 7 % 30:03d}-{number}.png")
    after = load_data(tmp_path)
    for split in ("train", "val", "test"):
        if getattr(before, split) is not None:
            assert paths(getattr(before, split)) < paths(getattr(after, split))


def test_a_split_does_not_depend_on_where_the_folder_lies_or_what_is_in_other_classes(tmp_path):
    def relative(root):
        return {
            split: {str(Path(path).relative_to(root)) for path in paths(getattr(load_data(root), split))}
            for split in ("train", "val", "test")
        }

    first = relative(fill(tmp_path / "one", {"b": 30, "c": 10}))
    second = relative(fill(tmp_path / "elsewhere/two", {"a": 9, "b": 30, "c": 10}))
    assert all(first[split] == {path for path in second[split] if not path.startswith("a/")} for split in first)


def test_names_that_are_not_utf8_are_read_and_shown(tmp_path):
    folder = fill(tmp_path, {"a": 2})
    strange = os.fsencode(folder) + b"/caf\xe9"
    os.mkdir(strange)
    for name in (b"/b\xff.png", b"/c.png"):
        Image.new("RGB", (4, 4)).save(os.fsdecode(strange + name))
    splits = load_data(folder)
    assert splits.classes == ("a", "caf\\xe9")
    assert sum(len(list(split)) for split in (splits.train, splits.val, splits.test)) == 4


def corrupt(path):
    path.write_bytes(path.read_bytes()[:40])


def test_a_corrupt_image_is_an_error_that_names_it_when_it_is_read(tmp_path):
    fill(tmp_path, {"train/a": 4, "train/b": 1, "val/a": 1, "val/b": 1})
    corrupt(tmp_path / "train/a/002.png")
    train = load_data(tmp_path).train
    with pytest.raises(DataError, match=r"train/a/002\.png") as raised:
        list(train)
    # This is how a loader's worker hands an error to its parent process.
    with pytest.raises(DataError, match=r"train/a/002\.png"):
        pickle.loads(pickle.dumps(ExceptionWrapper((raised.type, raised.value, raised.tb)))).reraise()


def test_skipping_drops_and_names_corrupt_images_and_leaves_the_other_splits_alone(tmp_path):
    fill(tmp_path, {"a": 30, "b": 30})
    before = load_data(tmp_path, seed=1)
    bad = before.train.source(5)
    corrupt(Path(bad))
    after = load_data(tmp_path, seed=1, on_corrupt="skip")
    assert after.skipped == after.train.skipped == (bad,)
    assert paths(after.train) == paths(before.train) - {bad}
    assert paths(after.val) == paths(before.val) and paths(after.test) == paths(before.test)
    loaded = DataLoader(after.train, batch_size=4, num_workers=2, collate_fn=list, shuffle=True)
    assert sum(len(batch) for batch in loaded) == len(before.train) - 1


def test_a_split_of_corrupt_images_only_is_an_error(tmp_path):
    fill(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 0})
    corrupt(tmp_path / "val/a/000.png")
    with pytest.raises(DataError, match=r"a split of 1 image, of which none.*val/a/000\.png"):
        load_data(tmp_path, on_corrupt="skip")


def test_transforms_are_put_on_a_copy_and_survive_pickling_into_spawned_workers(tmp_path):
    fill(tmp_path, {"train/a": 3, "train/b": 1, "val/a": 1, "val/b": 0})
    splits = load_data(tmp_path)
    transform = build_transform(Preprocessing((8, 10), (0.5,) * 3, (0.5,) * 3, "bicubic"))
    changed = splits.with_transform(transform)
    assert isinstance(splits.train[0][0], Image.Image)
    assert changed.train[0][0].shape == changed.val[0][0].shape == (3, 8, 10) and changed.test is None
    assert (pickle.loads(pickle.dumps(changed.train))[1][0] == changed.train[1][0]).all()
    spawned = DataLoader(changed.train, batch_size=3, num_workers=1, multiprocessing_context="spawn")
    images, labels = next(iter(spawned))
    assert images.shape == (3, 3, 8, 10) and labels.tolist() == [0, 0, 0]
    # Each image has one colour, its number in the red channel.
    assert np.allclose(images[:, 0].amax((1, 2)), [(number / 255 - 0.5) / 0.5 for number in range(3)], atol=1e-6)


def test_training_images_can_have_a_transform_of_their_own(tmp_path):
    fill(tmp_path, {"train/a": 2, "train/b": 2, "val/a": 1, "val/b": 1})
    changed = load_data(tmp_path).with_transform(lambda image: "plain", train=lambda image: "augmented")
    assert (changed.train[0][0], changed.val[0][0]) == ("augmented", "plain")


def test_torch_image_folder_never_gives_one_image_to_two_splits(tmp_path):
    fill(tmp_path, {"a": 10, "b": 10})
    splits = load_data("torch/image_folder", root=tmp_path)
    parts = [paths(part) for part in (splits.train, splits.val, splits.test)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 20


def test_unknown_data_sets_get_the_forms_and_the_nearest_name(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"Did you mean 'digits'.*folder:PATH.*torch/NAME"):
        load_data("digts")
    fill(tmp_path, {"flowers/a": 1})
    with pytest.raises(DataError, match=r"Did you mean '.*/flowers'"):
        load_data(str(tmp_path / "flower"))
    (tmp_path / "list.txt").touch()
    with pytest.raises(DataError, match="is a file"):
        load_data(tmp_path / "list.txt")
    monkeypatch.chdir(fill(tmp_path, {"digits/x": 5, "digits/y": 5}))
    assert load_data("digits").num_classes == 10
    assert load_data(Path("digits")).classes == load_data("folder:digits").classes == ("x", "y")
    with pytest.raises(DataError, match="val_fraction"):
        load_data("digits", val_fraction=1.0)
    with pytest.raises(DataError, match="on_corrupt"):
        load_data("digits", on_corrupt="ignore")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", r"'' names no data.*current folder is '\.'"),
        ("folder:", r"'folder:' names no data.*'folder:\.'"),
        ("x" * 300, "cannot be looked for"),
        ("folder:" + "x" * 300, "cannot be looked for"),
        ("~nobody-of-this-name/set", "cannot be looked for"),
    ],
)
@pytest.mark.parametrize("load", [load_data, load_held])
def test_names_that_cannot_be_those_of_data_are_refused(tmp_path, monkeypatch, load, name, message):
    monkeypatch.chdir(fill(tmp_path, {"a": 5, "b": 5}))
    with pytest.raises(DataError, match=message) as refused:
        load(name)
    assert len(str(refused.value)) < 200
