"""The task folders of a benchmark on disk: found under any of their names, and checked before anything is trained."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from dyntune.data.base import DataSplits
from dyntune.data.files import FileImages
from dyntune.data.vtab import LISTS, load_vtab_task
from dyntune.errors import DataError
from dyntune.vtab.tasks import Benchmark, Task

TrainList = Literal["train800", "train800val200"]
_MOST_SHOWN = 3


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
            "that they list. Restore what is missing, or leave tasks out with --tasks."
        )
    return found


def load_task(task: Task, folder: Path, train: TrainList) -> DataSplits:
    """The splits of a task; with ``train800val200`` there is no validation split."""
    splits = load_vtab_task(folder, train, name=task.title)
    return DataSplits(task.title, splits.train, splits.val, splits.test, tuple(map(str, range(task.classes))))


def _problems(task: Task, folder: Path, benchmark: Benchmark) -> list[str]:
    missing = [f"no list file {folder / name}.txt" for name in LISTS if not (folder / f"{name}.txt").is_file()]
    if missing:
        return missing
    try:
        # Images are looked for below, all of them at once.
        short = load_vtab_task(folder, "train800", on_corrupt="skip")
        final = load_vtab_task(folder, "train800val200", on_corrupt="skip")
    except DataError as error:
        return [str(error)]
    lists = dict(zip(LISTS, (short.train, short.val, final.train, short.test), strict=True))
    expected = {
        "train800": (benchmark.train_images,),
        "val200": (benchmark.val_images,),
        "train800val200": (benchmark.train_images + benchmark.val_images,),
        "test": task.test_images,
    }
    problems = []
    for name, images in lists.items():
        assert isinstance(images, FileImages)
        wanted = expected[name]
        if wanted and len(images) not in wanted:
            problems.append(f"{folder / name}.txt has {len(images)} lines, expected {' or '.join(map(str, wanted))}")
        gone = _missing(images.paths)
        if gone:
            some = ", ".join(gone[:_MOST_SHOWN]) + (", ..." if len(gone) > _MOST_SHOWN else "")
            problems.append(f"{len(gone)} of the {len(images)} images of {folder / name}.txt are missing: {some}")
    return problems + _label_problems(task, {name: images.targets for name, images in lists.items() if images})


def _label_problems(task: Task, labels: Mapping[str, Iterable[int]]) -> list[str]:
    found = set().union(*labels.values())
    if found == set(range(task.classes)):
        return []
    above = sorted(found - set(range(task.classes)))
    problem = f"labels up to {above[-1]}" if above else f"{len(found)} different labels"
    return [f"{problem} in its lists, expected the {task.classes} labels 0 to {task.classes - 1}"]


def _missing(paths: Iterable[str]) -> list[str]:
    """The paths at which there is no file; each folder is read once, because a stat per image takes minutes."""

    @functools.cache
    def files_in(folder: str) -> frozenset[str]:
        try:
            with os.scandir(folder) as entries:
                return frozenset(entry.name for entry in entries if entry.is_file())
        except OSError:
            return frozenset()

    return [path for path in paths if os.path.basename(path) not in files_in(os.path.dirname(path))]
