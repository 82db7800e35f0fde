"""The tasks of VTAB-1K, and the check of their folders before anything is trained."""

import shutil

import pytest
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.studies.vtab.folders import find_folders, load_task
from dyntune.studies.vtab.tasks import VTAB_1K, Benchmark, Task, open_benchmark

SMALL = Benchmark(
    "small",
    (
        Task("cifar", "CIFAR-100", "Natural", 3, (5, 6), ("cifar100",)),
        Task("oxford_iiit_pet", "Pets", "Natural", 2, (4,), ("oxford_pet", "pets")),
        Task("kitti", "KITTI-Dist", "Structured", 2, (4,)),
    ),
    train_images=6,
    val_images=2,
)


def write_task(folder, classes, sizes):
    """A task folder in the exporter's layout: one picture, linked under every listed name."""
    for split, size in sizes.items():
        (folder / "images" / split).mkdir(parents=True)
        lines = []
        for number in range(size):
            name = f"images/{split}/{number:06d}.jpg"
            if number == 0:
                Image.new("RGB", (8, 8), (90, 60, 30)).save(folder / name)
            else:
                (folder / name).hardlink_to(folder / f"images/{split}/000000.jpg")
            lines.append(f"{name} {number % classes}\n")
        (folder / f"{split}.txt").write_text("".join(lines))


@pytest.fixture
def root(tmp_path):
    sizes = {"train800": 6, "val200": 2, "train800val200": 8}
    write_task(tmp_path / "cifar100", 3, sizes | {"test": 6})
    write_task(tmp_path / "oxford_iiit_pet", 2, sizes | {"test": 4})
    write_task(tmp_path / "kitti", 2, sizes | {"test": 4})
    return tmp_path


def test_vtab_1k_has_nineteen_tasks_in_three_groups():
    assert len(VTAB_1K.tasks) == 19 and sum(task.classes for task in VTAB_1K.tasks) == 940
    sizes = [sum(task.group == group for task in VTAB_1K.tasks) for group in VTAB_1K.groups]
    assert dict(zip(VTAB_1K.groups, sizes, strict=True)) == {"Natural": 7, "Specialized": 4, "Structured": 8}
    names = [name for task in VTAB_1K.tasks for name in (task.folder, *task.aliases)]
    assert len(names) == len(set(names))
    assert next(task for task in VTAB_1K.tasks if task.folder == "caltech101").test_images == (6084, 6085)


def test_tasks_are_chosen_by_any_of_their_names_in_table_order():
    chosen = VTAB_1K.choose(["dtd", "CIFAR100", "Pets"])
    assert [task.folder for task in chosen.tasks] == ["cifar", "dtd", "oxford_iiit_pet"]
    with pytest.raises(DataError, match="Did you mean 'eurosat'"):
        VTAB_1K.choose(["eurosatt"])


def test_folders_are_found_under_either_name(root):
    folders = find_folders(SMALL, root)
    assert {name: folder.name for name, folder in folders.items()} == {
        "cifar": "cifar100",
        "oxford_iiit_pet": "oxford_iiit_pet",
        "kitti": "kitti",
    }
    data = load_task(SMALL.tasks[0], folders["cifar"], "train800val200")
    assert (len(data.train), data.val, len(data.test), data.classes) == (8, None, 6, ("0", "1", "2"))
    assert len(load_task(SMALL.tasks[0], folders["cifar"], "train800").val) == 2


def test_lists_whose_labels_start_at_1_are_taken(root):
    for file in (root / "cifar100").glob("*.txt"):
        lines = [line.rsplit(maxsplit=1) for line in file.read_text().splitlines()]
        file.write_text("".join(f"{path} {int(label) + 1}\n" for path, label in lines))
    data = load_task(SMALL.tasks[0], find_folders(SMALL, root)["cifar"], "train800")
    assert set(data.train.targets) == {0, 1, 2} and data.classes == ("0", "1", "2")
    (root / "kitti/test.txt").write_text("".join(f"images/test/{n:06d}.jpg {n % 2 + 1}\n" for n in range(4)))
    with pytest.raises(DataError, match="labels up to 2 in its lists, expected the 2 labels 0 to 1"):
        find_folders(SMALL, root)


def test_everything_that_is_wrong_is_in_one_error(root):
    shutil.rmtree(root / "oxford_iiit_pet")
    for name in ("000001", "000003"):
        (root / "cifar100" / "images" / "test" / f"{name}.jpg").unlink()
    (root / "cifar100" / "train800.txt").write_text("images/train800/000000.jpg 7\n")
    (root / "kitti" / "val200.txt").unlink()
    with pytest.raises(DataError) as caught:
        find_folders(SMALL, root)
    text = str(caught.value)
    for words in (
        f"Pets: no folder {root / 'oxford_iiit_pet'} (also looked for oxford_pet, pets)",
        "train800.txt has 1 lines, expected 6",
        "2 of the 6 images of",
        "000003.jpg",
        "labels up to 7 in its lists, expected the 3 labels 0 to 2",
        f"KITTI-Dist: no list file {root / 'kitti' / 'val200.txt'}",
        "--tasks",
    ):
        assert words in text, text


def test_a_bad_line_hides_nothing_else(root):
    kitti = root / "kitti"
    lines = (kitti / "train800.txt").read_text().splitlines()
    lines[1], lines[4] = "images/train800/000001.jpg far", "../elsewhere/000004.jpg 0"
    (kitti / "train800.txt").write_text("\n\n".join(lines))
    (kitti / "val200.txt").write_bytes(b"\xff\xfe 1")
    (kitti / "images" / "train800" / "000002.jpg").unlink()
    (kitti / "images" / "test" / "000001.jpg").unlink()
    (kitti / "images" / "test" / "000001.jpg").write_bytes(b"")
    (kitti / "images" / "test" / "000003.jpg").unlink()
    (kitti / "images" / "test" / "000003.jpg").symlink_to(kitti / "nowhere.jpg")
    with pytest.raises(DataError) as caught:
        find_folders(SMALL, root)
    text = str(caught.value)
    for words in (
        f"{kitti / 'train800.txt'} line 3: malformed line 'images/train800/000001.jpg far', line 9: '../elsewhere/",
        "lies outside the task folder (2 of its 6 lines are wrong)",
        f"1 of the 4 images of {kitti / 'train800.txt'} are missing: {kitti / 'images/train800/000002.jpg'}",
        f"cannot read the list file {kitti / 'val200.txt'}",
        f"1 of the 4 images of {kitti / 'test.txt'} are missing: {kitti / 'images/test/000003.jpg'}",
        f"1 of the 4 images of {kitti / 'test.txt'} are empty files: {kitti / 'images/test/000001.jpg'}",
    ):
        assert words in text, text
    assert text.count("KITTI-Dist") == 5


def test_no_list_repeats_an_image_and_none_shares_one_with_the_test_list(root):
    def replace_line(task, name, number, line):
        file = root / task / f"{name}.txt"
        lines = file.read_text().splitlines()
        lines[number - 1] = line
        file.write_text("\n".join(lines) + "\n")

    # train800val200 may name the images of the other two lists.
    pets = root / "oxford_iiit_pet"
    both = (pets / "train800.txt").read_text() + (pets / "val200.txt").read_text()
    (pets / "train800val200.txt").write_text(both)
    find_folders(SMALL, root)

    replace_line("kitti", "train800", 3, "images/./train800/000001.jpg 0")
    replace_line("kitti", "train800val200", 1, "images/test/000002.jpg 0")
    replace_line("cifar100", "val200", 2, "images/test/000001.jpg 1")
    replace_line("oxford_iiit_pet", "val200", 1, "images/train800/000000.jpg 0")
    with pytest.raises(DataError) as caught:
        find_folders(SMALL, root)
    text = str(caught.value)
    for words in (
        "train800.txt: images/train800/000001.jpg (lines 2 and 3, labels 1 and 0)",
        f"KITTI-Dist: 1 image of {root / 'kitti' / 'test.txt'} is in train800val200.txt too: images/test/000002.jpg",
        f"CIFAR-100: 1 image of {root / 'cifar100' / 'test.txt'} is in val200.txt too: images/test/000001.jpg",
        f"Pets: 1 image of {pets / 'val200.txt'} is in train800.txt too",
    ):
        assert words in text, text
    assert text.count("\n  ") == 4


def test_a_number_of_test_images_that_differs_between_versions_may_be_either(root):
    file = root / "cifar100" / "test.txt"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))
    find_folders(SMALL, root)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:4]))
    with pytest.raises(DataError, match=r"test\.txt has 4 lines, expected 5 or 6"):
        find_folders(SMALL, root)


def test_a_malformed_line_is_reported_with_the_rest(root):
    (root / "kitti" / "test.txt").write_text("images/test/000000.jpg far\n")
    shutil.rmtree(root / "oxford_iiit_pet")
    with pytest.raises(DataError, match=r"(?s)Pets.*KITTI-Dist: .*test\.txt line 1: malformed"):
        find_folders(SMALL, root)
    with pytest.raises(DataError, match="no folder"):
        find_folders(SMALL, root / "nowhere")


def test_a_root_that_describes_its_tasks_is_recognised(mini_root, root, tmp_path, monkeypatch):
    benchmark, folder = open_benchmark(str(mini_root))
    assert folder == mini_root and benchmark.name == "vtab-mini"
    assert benchmark.groups == ("Natural", "Specialized", "Structured") and benchmark.train_images == 16
    assert len(find_folders(benchmark, folder)) == len(benchmark.tasks)
    assert open_benchmark(str(root)) == (VTAB_1K, root)
    (root / "vtab-mini.json").write_text('{"name": 1')
    with pytest.raises(DataError, match="damaged"):
        open_benchmark(str(root))
