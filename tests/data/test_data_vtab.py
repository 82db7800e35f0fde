"""VTAB-1K task folders: the lists, their labels, and errors that name file and line."""

import pytest
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.data import load_data, load_vtab_task

LISTS = {
    "train800": ["images/train800/000000.jpg 0", "images/train800/000001.jpg\t2"],
    "val200": ["images/val200/000000.jpg   1"],
    "test": ["images/test/000000.jpg 3", "images/test/a name.jpg 0", "images/test/000002.jpg 1"],
}
LISTS["train800val200"] = LISTS["train800"] + LISTS["val200"]


@pytest.fixture
def task(tmp_path):
    number = 0
    for name, lines in LISTS.items():
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        for line in lines:
            image = tmp_path / line.rsplit(maxsplit=1)[0]
            image.parent.mkdir(parents=True, exist_ok=True)
            if not image.exists():
                number += 1
                Image.new("RGB", (8, 8), (number * 20,) * 3).save(image)
    return tmp_path


@pytest.mark.parametrize("form", ["{}", "vtab:{}"])
def test_the_lists_give_splits_and_labels_in_their_order(task, form):
    splits = load_data(form.format(task))
    assert splits.train.targets == (0, 2) and splits.val.targets == (1,) and splits.test.targets == (3, 0, 1)
    assert splits.classes == ("0", "1", "2", "3")  # the largest label is in the test list
    image, label = splits.test[1]
    assert label == 0 and image.tobytes() == Image.open(task / "images/test/a name.jpg").tobytes()
    assert splits.train.source(1) == f"{task}/images/train800/000001.jpg ({task}/train800.txt line 2)"


def test_the_final_training_list_has_no_validation_split(task):
    splits = load_vtab_task(task, train="train800val200")
    assert splits.train.targets == (0, 2, 1) and splits.val is None and splits.num_classes == 4
    with pytest.raises(DataError, match="Did you mean 'train800'"):
        load_vtab_task(task, train="train80")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("images/test/000000.jpg", "malformed line"),
        ("images/test/000000.jpg cat", "malformed line"),
        ("images/test/000000.jpg 1.0", "malformed line"),
        ("images/test/000000.jpg -1", "label -1 is out of range"),
        ("images/test/000000.jpg 900", "label 900 is out of range"),
        ("images/test/999999.jpg 1", "there is no image .*999999.jpg"),
        ("../../secret.jpg 1", "outside the task folder"),
        ("/secret.jpg 1", "outside the task folder"),
    ],
)
def test_a_bad_line_is_named_by_file_and_line(task, line, words):
    lines = [*LISTS["test"], "", line]
    (task / "test.txt").write_text("\r\n".join(lines))
    with pytest.raises(DataError, match=rf"test\.txt line 5: .*{words}"):
        load_data(task)


def test_labels_that_start_at_1_count_as_one_less(task, caplog):
    for name, lines in LISTS.items():
        moved = [f"{(parts := line.rsplit(maxsplit=1))[0]} {int(parts[1]) + 1}" for line in lines]
        (task / f"{name}.txt").write_text("\n".join(moved))
    splits = load_data(task)
    assert splits.train.targets == (0, 2) and splits.val.targets == (1,) and splits.test.targets == (3, 0, 1)
    assert splits.classes == ("0", "1", "2", "3") and "labels of its lists start at 1" in caplog.text


def test_missing_and_empty_lists_are_named(task):
    (task / "val200.txt").write_text("\n \n")
    with pytest.raises(DataError, match=r"val200\.txt is empty"):
        load_data(task)
    (task / "val200.txt").unlink()
    with pytest.raises(DataError, match=r"no list file .*val200\.txt"):
        load_data(task)


def test_corrupt_and_missing_images_are_skipped_and_named_with_their_line(task):
    broken = task / "images/test/000002.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    with pytest.raises(DataError, match=r"000002\.jpg \(.*test\.txt line 3\)"):
        load_data(task).test[2]
    (task / "images/train800/000000.jpg").unlink()
    splits = load_data(task, on_corrupt="skip")
    assert splits.train.targets == (2,) and splits.test.targets == (3, 0)
    assert splits.skipped == (
        f"{task}/images/train800/000000.jpg ({task}/train800.txt line 1)",
        f"{broken} ({task}/test.txt line 3)",
    )
