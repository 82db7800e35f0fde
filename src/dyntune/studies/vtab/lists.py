"""The check of a task's four lists: every line, every image, and that no image is in two lists that must differ."""

from __future__ import annotations

import contextlib
import functools
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dyntune.data.vtab import LISTS, Entry, ImageList, read_list

_MOST_SHOWN = 3
_DISJOINT = (("train800", "test"), ("val200", "test"), ("train800val200", "test"), ("train800", "val200"))
"""Pairs that share no image. train800val200 may list those of train800 and val200, or copies of its own."""


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
            problems.append(f"{file} {_some(images.bad)} ({len(images.bad)} of its {images.lines} lines are wrong)")
        if not images.lines or (sizes[name] and images.lines not in sizes[name]):
            expected = " or ".join(map(str, sizes[name])) or "at least 1"
            problems.append(f"{file} has {images.lines} lines, expected {expected}")
        if twice := _twice(images):
            problems.append(f"{len(twice)} listed twice in {file}: {_some(twice)}")
        found = {path: file_size(f"{folder}/{path}") for path, _, _ in images.entries}
        if gone := [f"{folder}/{path}" for path, size in found.items() if size is None]:
            problems.append(f"{len(gone)} of the {len(found)} images of {file} are missing: {_some(gone)}")
        if empty := [f"{folder}/{path}" for path, size in found.items() if size == 0]:
            problems.append(f"{len(empty)} of the {len(found)} images of {file} are empty files: {_some(empty)}")
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
                problems.append(f"{len(both)} images of {lists[other].file} are in {train}.txt too: {_some(both)}")
    return problems


def _labels(lists: Mapping[str, ImageList], classes: int) -> list[str]:
    found = {entry.label for images in lists.values() for entry in images.entries}
    outside = sorted(found - set(range(classes)))
    whole = len(lists) == len(LISTS) and not any(images.bad for images in lists.values())
    if outside:
        problem = f"labels up to {outside[-1]}" if outside[-1] >= classes else f"labels down to {outside[0]}"
    elif whole and len(found) < classes:
        problem = f"{len(found)} different labels"
    else:
        return []
    return [f"{problem} in its lists, expected the {classes} labels 0 to {classes - 1}"]


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


def _some(found: Sequence[str]) -> str:
    return ", ".join(found[:_MOST_SHOWN]) + (", ..." if len(found) > _MOST_SHOWN else "")
