"""vtab-mini: six small tasks in VTAB's groups and VTAB-1K's folder layout, made on the spot without a download."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dyntune.core.errors import DataError
from dyntune.core.files import load_json, room_beside, write_json
from dyntune.core.limits import limits_named
from dyntune.data.drawn.mini_drawn import (
    CELLS,
    COUNTS,
    DIRECTIONS,
    FIELDS,
    draw_cells,
    draw_count,
    draw_direction,
    draw_fields,
)
from dyntune.data.drawn.mini_natural import MATERIALS, Place, draw_digit, draw_material
from dyntune.data.drawn.procedural import Random
from dyntune.data.vtab import load_vtab_task

NAME = "vtab-mini"
VERSION = 1  # counts up when an image of any task changes
INDEX = f"{NAME}.json"
Draw = Callable[[Random, int, Place], Image.Image]


class MiniTask(NamedTuple):
    """One task of vtab-mini.

    Attributes:
        folder: name of its folder.
        title: name to print.
        group: ``"natural"``, ``"specialized"`` or ``"structured"``, as in VTAB.
        classes: class names in label order.
        draw: from random numbers, a label and a place to an RGB image of 32x32 pixels.
    """

    folder: str
    title: str
    group: str
    classes: tuple[str, ...]
    draw: Draw


def _anywhere(draw: Callable[[Random, int], Image.Image]) -> Draw:
    """For images made of random numbers alone, which no two splits share."""
    return lambda rng, label, place: draw(rng, label)


VTAB_MINI: tuple[MiniTask, ...] = (
    MiniTask("digits", "Digits", "natural", tuple(str(digit) for digit in range(10)), draw_digit),
    MiniTask("materials", "Materials", "natural", MATERIALS, draw_material),
    MiniTask("cells", "Cells", "specialized", CELLS, _anywhere(draw_cells)),
    MiniTask("fields", "Fields", "specialized", FIELDS, _anywhere(draw_fields)),
    MiniTask("shapes_count", "Shapes-Count", "structured", COUNTS, _anywhere(draw_count)),
    MiniTask("shapes_orientation", "Shapes-Ori", "structured", DIRECTIONS, _anywhere(draw_direction)),
)


def write_vtab_mini(
    root: Path, *, seed: int = 0, test_images: int = 500, train_images: int = 800, val_images: int = 200
) -> Path:
    """Write the task folders of vtab-mini, and ``vtab-mini.json``, which describes them, to ``root``.

    Each task folder appears once it is complete; a folder that is there already is kept, so that a call that was
    interrupted can be made again. Labels take turns, so the classes of a split differ by one image at most. The
    splits of a task share no digit, no part of a photograph and no random numbers. The same seed and sizes give the
    same pixels; the bytes also depend on Pillow's JPEG library.

    Args:
        root: folder of the task folders; it is made if it is missing.
        seed: all images follow from it.
        test_images: images in each task's ``test.txt``.
        train_images: images in ``train800.txt``; the list is called so whatever its length.
        val_images: images in ``val200.txt``; ``train800val200.txt`` has its own copies of both.

    Returns:
        ``root``.

    Raises:
        DataError: an argument is out of range, ``root`` holds something else or cannot be written, or a task folder
            there is not complete.
    """
    root = Path(root)
    sizes = {"train800": train_images, "val200": val_images, "test": test_images}
    if seed < 0 or min(sizes.values()) < 1:
        raise DataError(
            f"seed {seed} with {train_images} training, {val_images} validation and {test_images} test images: "
            "expected a seed of 0 or greater and at least one image of each."
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        _claim(root, _index(seed, sizes))
        for number, task in enumerate(VTAB_MINI):
            if (root / task.folder).exists():
                _check(root / task.folder, sizes)
            else:
                _write_task(root, number, seed, sizes)
    except OSError as error:
        raise DataError(f"cannot write {NAME} to {root} ({error}). Name a folder that can be written.") from error
    return root


def _index(seed: int, sizes: dict[str, int]) -> dict[str, Any]:
    tasks = [
        {"folder": task.folder, "title": task.title, "group": task.group, "classes": list(task.classes)}
        for task in VTAB_MINI
    ]
    return {"name": NAME, "version": VERSION, "seed": seed, "sizes": sizes, "tasks": tasks}


def _claim(root: Path, index: dict[str, Any]) -> None:
    """Write the index before any task, so that a task folder beside it is known to be of its seed and sizes."""
    file = root / INDEX
    if file.exists():
        try:
            found = load_json(file)
        except (ValueError, OSError) as error:
            raise DataError(f"cannot read {file} ({error}). Remove {root}, or name another folder.") from error
        if found != index:
            asked, there = (
                ", ".join(f"{key} {each.get(key)}" for key in ("version", "seed", "sizes"))
                for each in (index, found if isinstance(found, dict) else {})
            )
            raise DataError(f"{root} holds {NAME} with {there}, not {asked}. Remove it, or name another folder.")
        return
    for task in VTAB_MINI:
        if (root / task.folder).exists():
            raise DataError(
                f"{root / task.folder} is there without {file}. Expected a new folder or one that {NAME} was written "
                "to; name another folder."
            )
    write_json(file, index)


def _check(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse a task folder that has lost lists or images since it was written."""
    try:
        splits = load_vtab_task(folder)
        both = load_vtab_task(folder, train="train800val200").train
    except DataError as error:
        raise DataError(f"{folder} is not complete: {error} Remove the folder to have it written again.") from error
    found = {"train800": len(splits.train), "val200": len(splits.val or ()), "test": len(splits.test or ())}
    if found != sizes or len(both) != sizes["train800"] + sizes["val200"]:
        raise DataError(
            f"{folder} is not complete: it lists {found}, expected {sizes}. Remove the folder to have it written again."
        )


def _write_task(root: Path, number: int, seed: int, sizes: dict[str, int]) -> None:
    """Fill a task folder in a temporary place and move it to ``root`` once it is complete."""
    task = VTAB_MINI[number]
    files: dict[str, list[tuple[bytes, int]]] = {}
    for stream, (split, size) in enumerate(sizes.items()):
        files[split] = []
        for index in range(size):
            turn, label = divmod(index, len(task.classes))
            rng = np.random.default_rng([seed, number, stream, index])
            files[split].append((_jpeg(task.draw(rng, label, Place(seed, split, turn))), label))
    files["train800val200"] = files["train800"] + files["val200"]
    with limits_named(), room_beside(root / task.folder) as scratch:
        folder = scratch / task.folder
        for split, images in files.items():
            (folder / "images" / split).mkdir(parents=True)
            lines = []
            for index, (data, label) in enumerate(images):
                name = f"images/{split}/{index:06d}.jpg"
                (folder / name).write_bytes(data)
                lines.append(f"{name} {label}\n")
            (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8", newline="\n")
        folder.rename(root / task.folder)


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=95, subsampling=0)
    return file.getvalue()
