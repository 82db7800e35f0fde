"""Tasks in groups, and the benchmarks that consist of them: VTAB-1K, vtab-mini, or what a folder describes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyntune.core.errors import DataError, unknown_name
from dyntune.core.files import load_json
from dyntune.data.datasets import data_root
from dyntune.data.drawn.vtab_mini import INDEX, NAME, write_vtab_mini


@dataclass(frozen=True)
class Task:
    """One task of a benchmark.

    Args:
        folder: its folder below the benchmark's root, and the name that users write.
        title: its name in tables.
        group: the group whose mean it counts in.
        classes: number of classes.
        test_images: the numbers of test images that there may be; empty if any number will do.
        aliases: other names of the folder.
        published: its column in the published table, if it is in there.
    """

    folder: str
    title: str
    group: str
    classes: int
    test_images: tuple[int, ...] = ()
    aliases: tuple[str, ...] = ()
    published: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """Tasks that are trained alike and averaged by group.

    Args:
        name: in titles and file names.
        tasks: in the order of the table; tasks of a group stand together.
        train_images: images in every ``train800`` list.
        val_images: images in every ``val200`` list.
    """

    name: str
    tasks: tuple[Task, ...]
    train_images: int = 800
    val_images: int = 200

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups in table order."""
        return tuple(dict.fromkeys(task.group for task in self.tasks))

    def choose(self, names: Sequence[str] | None) -> Benchmark:
        """The same benchmark with some of its tasks, in table order; None chooses all.

        Raises:
            DataError: a name is no task's folder, alias or title.
        """
        if names is None:
            return self
        known = {name.lower(): task for task in self.tasks for name in (task.folder, task.title, *task.aliases)}
        for name in names:
            if name.lower() not in known:
                raise DataError(unknown_name(f"{self.name} task", name, (task.folder for task in self.tasks)))
        chosen = {known[name.lower()] for name in names}
        if not chosen:
            raise DataError(f"no task given; {self.name} has {', '.join(task.folder for task in self.tasks)}.")
        return Benchmark(self.name, tuple(t for t in self.tasks if t in chosen), self.train_images, self.val_images)


VTAB_1K = Benchmark(
    "VTAB-1K",
    (
        Task("cifar", "CIFAR-100", "Natural", 100, (10_000,), ("cifar100", "cifar-100"), "cifar100"),
        Task("caltech101", "Caltech101", "Natural", 102, (6_084, 6_085), (), "caltech101"),
        Task("dtd", "DTD", "Natural", 47, (1_880,), (), "dtd"),
        Task("oxford_flowers102", "Flowers102", "Natural", 102, (6_149,), ("flowers102", "flowers"), "flowers102"),
        Task("oxford_iiit_pet", "Pets", "Natural", 37, (3_669,), ("oxford_pet", "oxford_pets", "pets", "pet"), "pets"),
        Task("svhn", "SVHN", "Natural", 10, (26_032,), ("svhn_cropped",), "svhn"),
        Task("sun397", "Sun397", "Natural", 397, (21_750,), ("sun",), "sun397"),
        Task("patch_camelyon", "Camelyon", "Specialized", 2, (32_768,), ("camelyon", "pcam"), "camelyon"),
        Task("eurosat", "EuroSAT", "Specialized", 10, (5_400,), (), "eurosat"),
        Task("resisc45", "Resisc45", "Specialized", 45, (6_300,), ("resisc",), "resisc45"),
        Task(
            "diabetic_retinopathy",
            "Retinopathy",
            "Specialized",
            5,
            (42_670,),
            ("diabetic_retinopathy_detection", "retinopathy"),
            "retinopathy",
        ),
        Task("clevr_count", "Clevr-Count", "Structured", 8, (15_000,), ("clevr_cnt",), "clevr_count"),
        Task("clevr_dist", "Clevr-Dist", "Structured", 6, (15_000,), ("clevr_distance",), "clevr_dist"),
        Task("dmlab", "DMLab", "Structured", 6, (22_735,), (), "dmlab"),
        Task("kitti", "KITTI-Dist", "Structured", 4, (711,), ("kitti_dist", "kitti_distance"), "kitti_dist"),
        Task("dsprites_loc", "dSpr-Loc", "Structured", 16, (73_728,), ("dsprites_location",), "dsprites_loc"),
        Task("dsprites_ori", "dSpr-Ori", "Structured", 16, (73_728,), ("dsprites_orientation",), "dsprites_ori"),
        Task(
            "smallnorb_azi",
            "sNORB-Azim",
            "Structured",
            18,
            (12_150,),
            ("smallnorb_azimuth", "snorb_azim"),
            "snorb_azim",
        ),
        Task(
            "smallnorb_ele",
            "sNORB-Elev",
            "Structured",
            9,
            (12_150,),
            ("smallnorb_elevation", "snorb_elev"),
            "snorb_elev",
        ),
    ),
)
"""The 19 tasks of VTAB-1K (Zhai et al., 2019, arXiv:1910.04867); folder names as the public exporter writes them."""


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
        index = load_json(file)
        sizes = index["sizes"]
        tasks = tuple(
            Task(t["folder"], t["title"], t["group"].capitalize(), len(t["classes"]), (sizes["test"],))
            for t in index["tasks"]
        )
        return Benchmark(index["name"], tasks, sizes["train800"], sizes["val200"])
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{file} is damaged ({error!r}). Remove {file.parent} and have it written again.") from error
