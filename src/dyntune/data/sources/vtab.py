"""A VTAB-1K task: a folder of images with four text files that list the splits."""

import posixpath
from pathlib import Path
from typing import Literal

from dyntune.core.errors import DataError, unknown_name
from dyntune.data.base import DataSplits
from dyntune.data.files import FileImages

LISTS = ("train800", "val200", "train800val200", "test")
TRAINS = ("train800", "train800val200")
LINE = "an image path below the task folder, white space, and a zero-based label, such as 'images/test/000123.jpg 17'"


def _read_list(folder: Path, name: str) -> list[tuple[str, int, str]]:
    """(path, label, "FILE line N") of each line; the images themselves are not looked at."""
    file = folder / f"{name}.txt"
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(
            f"no list file {file}. Expected {', '.join(f'{each}.txt' for each in LISTS)} in a VTAB-1K task folder; "
            "restore it, or use folder:PATH for a folder of class folders."
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the list file {file} ({error}). Expected UTF-8 text, each line {LINE}."
        ) from error
    entries = []
    # Only newlines end a line here, so that the numbers in messages are those an editor shows.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{file} line {number}"
        parts = line.strip().rsplit(maxsplit=1)
        if len(parts) != 2 or not parts[1].lstrip("+-").isdecimal():
            raise DataError(f"{where}: malformed line {line.strip()[:200]!r}. Expected {LINE}; mend the line.")
        path = posixpath.normpath(parts[0])
        if path.startswith(("/", "../")) or path == "..":
            raise DataError(f"{where}: {parts[0]!r} lies outside the task folder. Expected {LINE}; mend the line.")
        try:
            label = int(parts[1])
        except ValueError as error:
            raise DataError(f"{where}: {parts[1][:50]!r} is no label. Expected {LINE}; mend the line.") from error
        entries.append((path, label, where))
    if not entries:
        raise DataError(f"the list file {file} is empty. Expected at least one line, each {LINE}.")
    return entries


def load_vtab_task(
    path: str | Path,
    train: Literal["train800", "train800val200"] = "train800",
    *,
    on_corrupt: Literal["error", "skip"] = "error",
    name: str | None = None,
) -> DataSplits:
    """Load a VTAB-1K task folder with ``{train800,val200,train800val200,test}.txt`` and the images they list.

    The number of classes is the largest label over all four lists plus one; classes are named by their numbers.

    Args:
        path: the task folder.
        train: the training list. With ``"train800val200"``, for the final training after choosing
            hyperparameters on ``val200``, there is no validation split, because its images are trained on.
        on_corrupt: with ``"error"`` a listed image that is missing is an error here; with ``"skip"`` it is left for
            :func:`dyntune.data.scan.scan` to drop.
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
    lists = {each: _read_list(folder, each) for each in LISTS}
    # A data set cannot have more classes than images: this catches a mistyped label before it sizes a huge head.
    limit = sum(len(entries) for entries in lists.values())
    splits = {}
    for each, entries in lists.items():
        for image, label, where in entries:
            if not 0 <= label < limit:
                raise DataError(
                    f"{where}: label {label} is out of range. Expected a zero-based label, 0 to at most {limit - 1} "
                    f"with {limit} images listed; mend the line."
                )
            if on_corrupt == "error" and not (folder / image).is_file():
                raise DataError(
                    f"{where}: there is no image {folder / image}. Expected each listed image below the task folder; "
                    "restore it, remove the line, or load the data set with on_corrupt='skip' (--on-corrupt skip)."
                )
        splits[each] = FileImages(
            [folder / image for image, _, _ in entries],
            [label for _, label, _ in entries],
            [where for _, _, where in entries],
        )
    count = 1 + max(max(split.targets) for split in splits.values())
    return DataSplits(
        name=str(path) if name is None else name,
        train=splits[train],
        val=splits["val200"] if train == "train800" else None,
        test=splits["test"],
        classes=tuple(str(label) for label in range(count)),
    )
