"""The task folders of a benchmark on disk: found under any of their names, their lists checked, their images read."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from dyntune.core.errors import DataError
from dyntune.core.texts import listed
from dyntune.core.words import counted
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.transforms import Preprocessing
from dyntune.data.vtab import LINE, LISTS, Entry, ImageList, first_label, load_vtab_task, read_list
from dyntune.studies.vtab.tasks import Benchmark, Task

TrainList = Literal["train800", "train800val200"]
_MOST_SHOWN = 3
_DISJOINT = (("train800", "test"), ("val200", "test"), ("train800val200", "test"), ("train800", "val200"))
"""Pairs that share no image. train800val200 may list those of train800 and val200, or copies of its own."""


def find_folders(benchmark: Benchmark, root: Path) -> dict[str, Path]:
    """The folder of every task, by ``Task.folder``; every list, count and image is checked first.

    Args:
        benchmark: with the tasks that are needed.
        root: the folder that holds the task folders.

    Raises:
        DataError: names everything that is missing or wrong in any of them.
    """
    if not root.is_dir():
        raise DataError(f"no folder {root}. Expected the folder that holds the {benchmark.name} task folders.")
    found: dict[str, Path] = {}
    wrong: list[str] = []
    for task in benchmark.tasks:
        names = (task.folder, *task.aliases)
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            also = f" (also looked for {', '.join(task.aliases)})" if task.aliases else ""
            wrong.append(f"{task.title}: no folder {root / task.folder}{also}")
            continue
        found[task.folder] = folder
        wrong += [f"{task.title}: {problem}" for problem in _problems(task, folder, benchmark)]
    if wrong:
        raise DataError(
            f"the {benchmark.name} data in {root} is not complete:\n  "
            + "\n  ".join(wrong)
            + f"\nExpected for each task its folder with {', '.join(f'{name}.txt' for name in LISTS)} and the images "
            f"that they list, each line {LINE}; test.txt shares no image with the others, and train800.txt none with "
            "val200.txt. Restore what is missing, mend what is wrong, or leave tasks out with --tasks."
        )
    return found


def load_task(task: Task, folder: Path, train: TrainList) -> DataSplits:
    """The splits of a task; with ``train800val200`` there is no validation split."""
    splits = load_vtab_task(folder, train, name=task.title)
    return DataSplits(task.title, splits.train, splits.val, splits.test, tuple(map(str, range(task.classes))))


def _problems(task: Task, folder: Path, benchmark: Benchmark) -> list[str]:
    sizes = {
        "train800": (benchmark.train_images,),
        "val200": (benchmark.val_images,),
        "train800val200": (benchmark.train_images + benchmark.val_images,),
        "test": task.test_images,
    }
    return list_problems(folder, sizes, task.classes)


def list_problems(folder: Path, sizes: Mapping[str, tuple[int, ...]], classes: int) -> list[str]:
    """Everything that is wrong with a task's lists and the images in them.

    Args:
        folder: of the task.
        sizes: by list, the numbers of lines that there may be; an empty tuple allows any but 0.
        classes: number of classes; together the lists have all of their labels.
    """
    problems: list[str] = []
    lists: dict[str, ImageList] = {}
    for name in LISTS:
        file = folder / f"{name}.txt"
        try:
            lists[name] = read_list(file)
        except FileNotFoundError:
            problems.append(f"no list file {file}")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(f"cannot read the list file {file} as UTF-8 text ({error})")
    file_size = _file_sizes()
    for name, images in lists.items():
        file = images.file
        if images.bad:
            problems.append(
                f"{file} {listed(images.bad, _MOST_SHOWN)} ({len(images.bad)} of its {images.lines} lines are wrong)"
            )
        if not images.lines or (sizes[name] and images.lines not in sizes[name]):
            expected = " or ".join(map(str, sizes[name])) or "at least 1"
            problems.append(f"{file} has {images.lines} lines, expected {expected}")
        if twice := _twice(images):
            problems.append(f"{len(twice)} listed twice in {file}: {listed(twice, _MOST_SHOWN)}")
        found = {path: file_size(f"{folder}/{path}") for path, _, _ in images.entries}
        if gone := [f"{folder}/{path}" for path, size in found.items() if size is None]:
            problems.append(
                f"{len(gone)} of the {counted(len(found), 'image')} of {file} are missing: {listed(gone, _MOST_SHOWN)}"
            )
        if empty := [f"{folder}/{path}" for path, size in found.items() if size == 0]:
            problems.append(
                f"{len(empty)} of the {counted(len(found), 'image')} of {file} are empty files: "
                f"{listed(empty, _MOST_SHOWN)}"
            )
    return problems + _shared(lists) + _labels(lists, classes)


def _twice(images: ImageList) -> list[str]:
    """The images that are in a list more than once, with both lines and labels."""
    first: dict[str, Entry] = {}
    found = []
    for entry in images.entries:
        before = first.setdefault(entry.path, entry)
        if before is not entry:
            labels = f"labels {before.label} and {entry.label}" if before.label != entry.label else "the same label"
            found.append(f"{entry.path} (lines {before.line} and {entry.line}, {labels})")
    return found


def _shared(lists: Mapping[str, ImageList]) -> list[str]:
    """What is in two lists that must share no image."""
    problems = []
    for train, other in _DISJOINT:
        if train in lists and other in lists:
            known = {entry.path for entry in lists[train].entries}
            both = [entry.path for entry in lists[other].entries if entry.path in known]
            if both:
                many, verb = counted(len(both), "image"), "is" if len(both) == 1 else "are"
                problems.append(f"{many} of {lists[other].file} {verb} in {train}.txt too: {listed(both, _MOST_SHOWN)}")
    return problems


def _labels(lists: Mapping[str, ImageList], classes: int) -> list[str]:
    found = {entry.label for images in lists.values() for entry in images.entries}
    first = first_label(lists.values())
    outside = sorted(found - set(range(first, classes + first)))
    whole = len(lists) == len(LISTS) and not any(images.bad for images in lists.values())
    if outside:
        problem = f"labels up to {outside[-1]}" if outside[-1] >= classes + first else f"labels down to {outside[0]}"
    elif whole and len(found) < classes:
        problem = f"{len(found)} different labels"
    else:
        return []
    return [f"{problem} in its lists, expected the {classes} labels {first} to {classes - 1 + first}"]


def _file_sizes() -> Callable[[str], int | None]:
    """A function from a path to the file's size, None if there is none; a folder is read once, for all its files."""

    @functools.cache
    def sizes_in(folder: str) -> dict[str, int]:
        sizes = {}
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    with contextlib.suppress(OSError):  # a link to nowhere is no file
                        found = entry.stat()
                        if stat.S_ISREG(found.st_mode):
                            sizes[entry.name] = found.st_size
        except OSError:
            return {}
        return sizes

    return lambda path: sizes_in(os.path.dirname(path)).get(os.path.basename(path))


class ResizedImages(LabelledImages):
    """The images of another data set, resized once to what a backbone takes and then kept.

    The resize is that of ``build_transform``, which then finds nothing left to do, so tensors are the same bits as
    without. An image takes 3 bytes per pixel: 1,000 images of 224 x 224 take 150 MB.

    Args:
        images: without a transform.
        preprocessing: of the backbone; size and interpolation count.
    """

    def __init__(self, images: LabelledImages, preprocessing: Preprocessing) -> None:
        super().__init__(images.targets, skipped=images.skipped)
        self.images, self.preprocessing = images, preprocessing
        self.classes = images.classes
        self.reads_files = images.reads_files
        self._kept: dict[int, Image.Image] = {}

    def read(self, index: int) -> Image.Image:
        if index not in self._kept:
            how = InterpolationMode(self.preprocessing.interpolation)
            self._kept[index] = resize(self.images.read(index), list(self.preprocessing.size), how)
        return self._kept[index]

    def source(self, index: int) -> str:
        return self.images.source(index)

    def place(self, index: int) -> str | None:
        return self.images.place(index)

    def identity(self, index: int) -> str:
        return self.images.identity(index)
