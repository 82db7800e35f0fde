"""The layout of a VTAB-1K task: a folder of images with four text files that list the splits."""

import logging
import os
import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dyntune.core.errors import DataError, unknown_name
from dyntune.core.texts import printable
from dyntune.data.base import DataSplits
from dyntune.data.datasets import SKIP, FileImages

LISTS = ("train800", "val200", "train800val200", "test")
TRAINS = ("train800", "train800val200")
LINE = "an image path below the task folder, white space, and a whole label, such as 'images/test/000123.jpg 17'"

log = logging.getLogger("dyntune")


class Entry(NamedTuple):
    """A line of a list: the image's path below the task folder, its label, and the line's number from 1."""

    path: str
    label: int
    line: int


@dataclass(frozen=True)
class ImageList:
    """A list file as far as it can be read.

    Args:
        file: its path.
        entries: the lines that are right.
        bad: "line N: malformed ..." for each of the others.
    """

    file: Path
    entries: tuple[Entry, ...]
    bad: tuple[str, ...]

    @property
    def lines(self) -> int:
        """How many lines there are, blank ones left out."""
        return len(self.entries) + len(self.bad)


def read_list(file: Path) -> ImageList:
    """The lines of a list file; neither the range of the labels nor the images themselves are looked at.

    Raises:
        OSError: there is no such file, or it cannot be read.
        UnicodeDecodeError: it is no UTF-8 text.
    """
    entries: list[Entry] = []
    bad: list[str] = []
    if file.exists() and not file.is_file():  # a pipe would be waited for, a device read for ever
        raise OSError("it is no file")
    # Only newlines end a line here, so that the numbers in messages are those an editor shows.
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        match line.strip().rsplit(maxsplit=1):
            case [path, label] if re.fullmatch(r"[+-]?\d{1,9}", label):
                place = posixpath.normpath(path)
                if place.startswith(("/", "../")) or place == "..":
                    bad.append(f"line {number}: {path!r} lies outside the task folder")
                else:
                    entries.append(Entry(place, int(label), number))
            case _:
                bad.append(f"line {number}: malformed line {line.strip()[:200]!r}")
    return ImageList(file, tuple(entries), tuple(bad))


def first_label(lists: Iterable[ImageList]) -> int:
    """The lowest label: 1 where all lists of a task count from there, else 0."""
    return int(min((entry.label for images in lists for entry in images.entries), default=0) == 1)


def _read_faultless(file: Path) -> ImageList:
    """A list file that can be read to its end; raises DataError for any other."""
    try:
        images = read_list(file)
    except FileNotFoundError as error:
        raise DataError(
            f"no list file {file}. Expected {', '.join(f'{each}.txt' for each in LISTS)} in a VTAB-1K task folder; "
            "restore it, or use folder:PATH for a folder of class folders."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the list file {file} ({error}). Expected UTF-8 text, each line {LINE}."
        ) from error
    if images.bad:
        raise DataError(f"{file} {images.bad[0]}. Expected {LINE}; mend the line.")
    if not images.entries:
        raise DataError(f"the list file {file} is empty. Expected at least one line, each {LINE}.")
    return images


def load_vtab_task(
    path: str | Path,
    train: Literal["train800", "train800val200"] = "train800",
    *,
    on_corrupt: Literal["error", "skip"] = "error",
    name: str | None = None,
) -> DataSplits:
    """Load a VTAB-1K task folder with ``{train800,val200,train800val200,test}.txt`` and the images they list.

    Labels count from 0; where the lowest of all four lists is 1, each counts as one less. The number of classes is the
    largest label over all four lists plus one; classes are named by their numbers.

    Args:
        path: the task folder.
        train: the training list. With ``"train800val200"``, for the final training after choosing
            hyperparameters on ``val200``, there is no validation split, because its images are trained on.
        on_corrupt: with ``"error"`` a listed image that is missing is an error here; with ``"skip"`` it is left for
            :func:`dyntune.data.load_data` to drop.
        name: what to call the data set; its path by default.

    Raises:
        DataError: a list file or a listed image is missing, or a line is malformed or its label out of range; the
            message names file and line.

    Source: the layout in which VTAB-1K (Zhai et al., 2019, arXiv:1910.04867) is passed around for
    parameter-efficient fine-tuning.
    """
    if train not in TRAINS:
        raise DataError(unknown_name("VTAB-1K training list", str(train), TRAINS))
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"no folder {folder}. Expected a VTAB-1K task folder; check the spelling.")
    lists = {each: _read_faultless(folder / f"{each}.txt") for each in LISTS}
    first = first_label(lists.values())
    if first:
        log.warning("%s: the labels of its lists start at 1; each counts as one less.", printable(str(folder)))
    # A data set cannot have more classes than images: this catches a mistyped label before it sizes a huge head.
    limit = sum(images.lines for images in lists.values())
    splits = {}
    for each, images in lists.items():
        origins = [f"{images.file} line {entry.line}" for entry in images.entries]
        for (image, label, _), where in zip(images.entries, origins, strict=True):
            if not first <= label < limit + first:
                raise DataError(
                    f"{where}: label {label} is out of range. Expected a label from {first} to at most "
                    f"{limit - 1 + first} with {limit} images listed; mend the line."
                )
            if on_corrupt == "error" and not os.path.isfile(folder / image):  # False for names that none can have
                raise DataError(
                    f"{where}: there is no image {folder / image}. Expected each listed image below the task folder; "
                    f"restore it or remove the line. {SKIP}"
                )
        splits[each] = FileImages(
            [folder / entry.path for entry in images.entries],
            [entry.label - first for entry in images.entries],
            origins,
        )
    count = 1 + max(max(split.targets) for split in splits.values())
    return DataSplits(
        name=str(path) if name is None else name,
        train=splits[train],
        val=splits["val200"] if train == "train800" else None,
        test=splits["test"],
        classes=tuple(str(label) for label in range(count)),
    )
