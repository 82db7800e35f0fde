"""From the ROOT argument to a benchmark and the folder that holds its tasks."""

from __future__ import annotations

import json
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.datasets import data_root
from dyntune.data.drawn.vtab_mini import INDEX, NAME, write_vtab_mini
from dyntune.studies.vtab.tasks import VTAB_1K, Benchmark, Task


def open_benchmark(root: str) -> tuple[Benchmark, Path]:
    """The benchmark that ``root`` names or holds, and its folder.

    ``vtab-mini`` is written below the folder of data sets unless it is there; a folder with ``vtab-mini.json`` holds
    it too; any other folder is taken for VTAB-1K's.

    Raises:
        DataError: the description in the folder is damaged, or vtab-mini cannot be written.
    """
    folder = write_vtab_mini(data_root() / NAME) if root == NAME else Path(root).expanduser()
    return (_described(folder / INDEX) if (folder / INDEX).is_file() else VTAB_1K), folder


def _described(file: Path) -> Benchmark:
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        sizes = index["sizes"]
        tasks = tuple(
            Task(t["folder"], t["title"], t["group"].capitalize(), len(t["classes"]), (sizes["test"],))
            for t in index["tasks"]
        )
        return Benchmark(index["name"], tasks, sizes["train800"], sizes["val200"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{file} is damaged ({error!r}). Remove {file.parent} and have it written again.") from error
