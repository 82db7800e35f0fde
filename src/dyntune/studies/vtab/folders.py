"""The task folders of a benchmark on disk: found under any of their names, and checked before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits
from dyntune.data.vtab import LINE, LISTS, load_vtab_task
from dyntune.studies.vtab.lists import list_problems
from dyntune.studies.vtab.tasks import Benchmark, Task

TrainList = Literal["train800", "train800val200"]


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
