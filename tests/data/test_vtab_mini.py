"""vtab-mini: VTAB-1K's layout to the letter, the same bytes for the same seed, and nothing shared between splits."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import load_vtab_task
from dyntune.data.drawn import mini_drawn, mini_natural, vtab_mini
from dyntune.data.drawn.mini_natural import CELL, CHINA, FLOWER, LETTERS, MATERIALS
from dyntune.data.drawn.vtab_mini import VTAB_MINI, write_vtab_mini

SIZES = {"train_images": 48, "val_images": 16, "test_images": 32}
COUNTS = {"train800": 48, "val200": 16, "train800val200": 64, "test": 32}
FOLDERS = [task.folder for task in VTAB_MINI]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_vtab_mini(tmp_path_factory.mktemp("mini") / "new" / "vtab-mini", **SIZES)


def contents(root):
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def lines(root, folder, split):
    text = (root / folder / f"{split}.txt").read_text()
    return [(name, int(label)) for name, label in (line.split(" ") for line in text.splitlines())]


def test_each_group_has_two_tasks_with_folders_and_titles_of_their_own():
    assert Counter(task.group for task in VTAB_MINI) == {"natural": 2, "specialized": 2, "structured": 2}
    assert len(set(FOLDERS)) == len({task.title for task in VTAB_MINI}) == 6
    assert all(len(set(task.classes)) == len(task.classes) for task in VTAB_MINI)


def test_the_tree_holds_the_lists_and_their_images_and_nothing_else(root):
    expected = {"vtab-mini.json"}
    for folder in FOLDERS:
        for split, count in COUNTS.items():
            names = [f"images/{split}/{index:06d}.jpg" for index in range(count)]
            assert [name for name, _ in lines(root, folder, split)] == names
            expected |= {f"{folder}/{name}" for name in (*names, f"{split}.txt")}
    assert set(contents(root)) == expected
    assert {path.name for path in root.iterdir()} == {"vtab-mini.json", *FOLDERS}


def test_the_index_describes_the_tasks(root):
    index = json.loads((root / "vtab-mini.json").read_text())
    assert (index["name"], index["seed"]) == ("vtab-mini", 0)
    assert index["sizes"] == {"train800": 48, "val200": 16, "test": 32}
    for entry, task in zip(index["tasks"], VTAB_MINI, strict=True):
        assert entry == {
            "folder": task.folder,
            "title": task.title,
            "group": task.group,
            "classes": list(task.classes),
        }


@pytest.mark.parametrize("task", VTAB_MINI, ids=FOLDERS)
def test_a_task_can_be_loaded_and_its_classes_are_equally_frequent(root, task):
    splits = load_vtab_task(root / task.folder)
    assert splits.num_classes == len(task.classes)
    for split in (splits.train, splits.val, splits.test):
        counts = [Counter(split.targets)[label] for label in range(len(task.classes))]
        assert sum(counts) == len(split)
        assert max(counts) - min(counts) <= 1
    image, _ = splits.test[0]
    assert (image.size, image.mode) == ((32, 32), "RGB")
    with Image.open(root / task.folder / "images/test/000000.jpg") as file:
        assert {layer[1:3] for layer in file.layer} == {(1, 1)}  # no channel is subsampled


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_image_occurs_twice_but_in_the_joint_training_list(root, folder):
    def images(split):
        return [(root / folder / name).read_bytes() for name, _ in lines(root, folder, split)]

    train, val, test = images("train800"), images("val200"), images("test")
    assert len({*train, *val, *test}) == 48 + 16 + 32
    assert images("train800val200") == train + val
    labels = {split: [label for _, label in lines(root, folder, split)] for split in COUNTS}
    assert labels["train800val200"] == labels["train800"] + labels["val200"]


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_images(root, tmp_path):
    first = contents(root)
    assert contents(write_vtab_mini(tmp_path / "again", **SIZES)) == first
    other = contents(write_vtab_mini(tmp_path / "other", seed=1, **SIZES))
    assert other.keys() == first.keys()
    assert not [name for name in first if name.endswith(".jpg") and first[name] == other[name]]


def test_more_images_begin_with_the_same_ones(root, tmp_path):
    more = contents(write_vtab_mini(tmp_path, **(SIZES | {"test_images": 40})))
    assert all(more[name] == data for name, data in contents(root).items() if name.endswith(".jpg"))


def test_splits_share_no_digit():
    pools = [
        [digit.tobytes() for members in mini_natural._digit_pool(3, split) for digit in members]
        for split in ("train800", "val200", "test")
    ]
    assert sum(len(pool) for pool in pools) == 1797
    assert sum(len(set(pool)) for pool in pools) == len(set().union(*pools))


def test_splits_share_no_part_of_a_photograph():
    for label, material in enumerate(MATERIALS):
        train, val, test = (mini_natural._material_cells(3, split, label) for split in ("train800", "val200", "test"))
        assert train and val and test
        cells = [*train, *val, *test]
        assert len(set(cells)) == len(cells)
        for photograph, row, column in cells:
            assert LETTERS[(CHINA, FLOWER)[photograph][row][column]] == material


def test_the_map_of_materials_lies_within_the_photographs():
    for grid, photograph in zip((CHINA, FLOWER), mini_natural._photographs(), strict=True):
        assert len(grid) * CELL <= photograph.shape[0]
        assert {len(line) * CELL for line in grid} == {photograph.shape[1]}


def test_counted_shapes_are_as_many_as_the_label_says(monkeypatch):
    drawn = []
    corners = vtab_mini.draw_count.__globals__["pose_corners"]
    monkeypatch.setitem(
        vtab_mini.draw_count.__globals__, "pose_corners", lambda pose: drawn.append(pose) or corners(pose)
    )
    for label in range(8):
        drawn.clear()
        vtab_mini.draw_count(np.random.default_rng(label), label)
        assert len(drawn) == label + 1
        reach = 13 * max(pose.scale for pose in drawn)
        for i, one in enumerate(drawn):
            assert reach <= min(one.x, one.y) and max(one.x, one.y) <= 64 - reach
            assert all(np.hypot(one.x - two.x, one.y - two.y) >= 2 * reach for two in drawn[:i])


def test_a_shape_points_where_its_label_says(monkeypatch):
    drawn, draw = [], mini_drawn.draw_pose
    monkeypatch.setattr(mini_drawn, "draw_pose", lambda pose: drawn.append(pose) or draw(pose))
    for label in [*range(16)] * 3:
        mini_drawn.draw_direction(np.random.default_rng(len(drawn)), label)
        assert int(drawn[-1].angle / (2 * np.pi) * 16) == label


def test_one_or_two_nuclei_are_too_large_in_an_abnormal_image_and_none_in_a_healthy_one(monkeypatch):
    radii = []
    monkeypatch.setattr(mini_drawn, "_disc", lambda draw, x, y, radius, fill, squeeze: radii.append(radius))
    for number in range(60):
        radii.clear()
        mini_drawn.draw_cells(np.random.default_rng(number), number % 2)
        shares = np.array(radii[1::2]) / np.array(radii[::2])
        assert (shares > 0.6).sum() in ((1, 2) if number % 2 else (0,))


def test_an_interrupted_call_can_be_made_again(root, tmp_path, monkeypatch):
    def stop(image):
        if (tmp_path / "cells").exists():
            raise KeyboardInterrupt
        return jpeg(image)

    jpeg = vtab_mini._jpeg
    monkeypatch.setattr(vtab_mini, "_jpeg", stop)
    with pytest.raises(KeyboardInterrupt):
        write_vtab_mini(tmp_path, **SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {"vtab-mini.json", "digits", "materials", "cells"}
    before = (tmp_path / "digits").stat().st_mtime_ns
    monkeypatch.undo()
    assert write_vtab_mini(tmp_path, **SIZES) == tmp_path
    assert contents(tmp_path) == contents(root)
    assert (tmp_path / "digits").stat().st_mtime_ns == before


def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("disk full")

    monkeypatch.setattr("pathlib.Path.rename", refuse)
    with pytest.raises(DataError, match=r"cannot write vtab-mini to .*disk full"):
        write_vtab_mini(tmp_path, train_images=1, val_images=1, test_images=1)
    assert [path.name for path in tmp_path.iterdir()] == ["vtab-mini.json"]


@pytest.mark.parametrize("wanted", [{"seed": 1}, {"test_images": 33}])
def test_another_seed_or_size_in_the_same_folder_is_refused(root, wanted):
    before = contents(root)
    with pytest.raises(DataError, match=r"holds vtab-mini with version 1, seed 0, .*Remove it, or name another folder"):
        write_vtab_mini(root, **(SIZES | wanted))
    assert contents(root) == before


def test_damaged_and_strange_folders_are_named(tmp_path):
    sizes = {"train_images": 16, "val_images": 2, "test_images": 2}
    write_vtab_mini(tmp_path, **sizes)
    image = tmp_path / "cells/images/train800val200/000017.jpg"
    data = image.read_bytes()
    image.unlink()
    with pytest.raises(DataError, match=r"cells is not complete: .*000017\.jpg.* Remove the folder"):
        write_vtab_mini(tmp_path, **sizes)
    image.write_bytes(data)
    (tmp_path / "fields/test.txt").write_text("images/test/000000.jpg 0\n")
    with pytest.raises(DataError, match=r"fields is not complete: it lists .*'test': 1"):
        write_vtab_mini(tmp_path, **sizes)
    (tmp_path / "vtab-mini.json").write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*vtab-mini\.json"):
        write_vtab_mini(tmp_path, **sizes)
    (tmp_path / "vtab-mini.json").unlink()
    with pytest.raises(DataError, match=r"digits is there without .*vtab-mini\.json"):
        write_vtab_mini(tmp_path, **sizes)


@pytest.mark.parametrize("wrong", [{"seed": -1}, {"test_images": 0}, {"train_images": 0}, {"val_images": -3}])
def test_arguments_out_of_range_are_refused_before_anything_is_written(tmp_path, wrong):
    with pytest.raises(DataError, match="a seed of 0 or greater and at least one image"):
        write_vtab_mini(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()
