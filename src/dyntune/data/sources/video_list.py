"""Lists of videos and labels, as the public code of video models keeps them."""

import csv
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.core.texts import listed, printable
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.sources.base import Held, Request, Source
from dyntune.data.splits import MOST_CLASSES, split_of
from dyntune.data.videos import LabelledVideos

log = logging.getLogger("dyntune")
FORM = (
    "Expected lines PATH LABEL, or FOLDER FRAMES LABEL, with blanks, tabs or commas between, no header, and paths "
    "that are absolute or from the list's folder"
)


@dataclass(frozen=True)
class Line:
    """One video of a list.

    Args:
        video: its path.
        label: as it is written.
        origin: the list, and the number of the line.
        split: that the line says it is of; None where that is the list's affair.
    """

    video: str
    label: str
    origin: str
    split: str | None = None


class VideoList(Source):
    """A text file with a path and a label in each line; labels are numbers, or all names.

    Paths are absolute or relative to the list's folder. A list called ``train``, or by another name of a training
    split, has its validation and test lists beside it, under names such as ``val.csv`` and ``test.csv`` with the same
    suffix; what is missing is treated as in a folder. A list by itself is evaluated on whole, each video in the split
    that it is of.
    """

    prefix = "video-list:"
    form = "video-list:FILE"

    def load(self, request: Request) -> DataSplits:
        lines: dict[str, list[Line]] = {}
        for split, path in _lists(request.path).items():
            for line in self.lines(path, request):
                lines.setdefault(line.split or split, []).append(line)
        every = [line for own in lines.values() for line in own]
        if "train" not in lines:
            raise DataError(f"{request.path} and the lists beside it name no videos to train on.")
        classes = _classes(every, request.path)
        sets = {split: _labelled(own, classes, request.path.parent) for split, own in lines.items()}
        return request.splits(sets["train"], sets.get("val"), sets.get("test"), classes)

    def lines(self, path: Path, request: Request) -> list[Line]:
        """The videos of one list.

        Raises:
            DataError: the list cannot be read as one.
        """
        return _read(path)

    def held(self, request: Request, classes: Sequence[str] | None = None) -> Held:
        path = request.path
        split = split_of(path.stem)
        if split == "train" or not path.is_file():
            return super().held(request, classes)
        lines = self.lines(path, request)
        if not lines:
            raise DataError(f"{path} has no labels to evaluate by.")
        names = list(classes or _classes(lines, path))
        written = [str(int(name)) if name.isdecimal() else name for name in names]
        if _are_numbers(lines) and not all(map(str.isdecimal, names)):
            labels = [int(line.label) for line in lines]
            first = int(min(labels) == 1 and max(labels) == len(names))
            written = [str(number) for number in range(first, first + len(names))]
            log.warning(
                "%s: its labels are numbers, taken for places among the model's classes: %s is %s, %s is %s.",
                path,
                *(word for place in (0, -1) for word in (written[place], printable(names[place]))),
            )
        for line in lines:
            if _name(line) not in written:
                raise DataError(
                    f"{line.origin}: {line.label!r} is none of the classes that the model was trained on "
                    f"({listed(names, 8)})."
                )
        grouped: dict[str, list[Line]] = {}
        for line in lines:
            grouped.setdefault(line.split or split or "test", []).append(line)
        splits: dict[str, LabelledImages] = {
            word: _labelled(own, written, path.parent) for word, own in grouped.items()
        }
        return Held(request.name, splits, tuple(names))


def _lists(path: Path) -> dict[str, Path]:
    """The list that is given, as ``train``, and those that lie beside it, by split."""
    if not path.is_file():
        raise DataError(f"no list {path}. {FORM}.")
    lists = {"train": path}
    if split_of(path.stem) != "train":
        return lists
    for other in sorted(path.parent.glob("*")):
        split = split_of(other.stem)
        if split not in ("val", "test") or other.suffix != path.suffix or not other.is_file():
            continue
        if split in lists:
            raise DataError(
                f"{path.parent} has {printable(lists[split].name)} and {printable(other.name)}: expected one {split} "
                "list; rename or remove the other."
            )
        lists[split] = other
    return lists


def _are_numbers(lines: Sequence[Line]) -> bool:
    """Whether labels are numbers; raises DataError if only some are."""
    names = [line for line in lines if not line.label.isdecimal()]
    if names and len(names) < len(lines):
        raise DataError(f"{names[0].origin}: its label is a name, but those of other lines are numbers. Give one kind.")
    return not names


def _name(line: Line) -> str:
    """What the class of a line is called; a number without leading zeros."""
    return str(int(line.label)) if line.label.isdecimal() else printable(line.label)


def _classes(lines: Sequence[Line], path: Path) -> list[str]:
    """The names of the classes; of numbers all up to the highest, from 0, or from 1 where that is the lowest.

    Raises:
        DataError: labels are names and numbers, or numbers of something else than classes.
    """
    if not _are_numbers(lines):
        return sorted({printable(line.label) for line in lines})
    labels = {int(line.label) for line in lines}
    if max(labels) >= max(MOST_CLASSES, 10 * len(labels)):
        raise DataError(f"{path}: the highest label is {max(labels)}. Expected numbers of classes, from 0 or 1.")
    if min(labels) == 1:
        log.warning("%s: the lowest label is 1, so that classes are taken to count from there.", path)
    return [str(label) for label in range(int(min(labels) == 1), max(labels) + 1)]


def _labelled(lines: Sequence[Line], classes: Sequence[str], root: Path) -> LabelledVideos:
    number = {name: label for label, name in enumerate(classes)}
    return LabelledVideos(
        [line.video for line in lines],
        [number[_name(line)] for line in lines],
        [line.origin for line in lines],
        root,
    )


def _read(path: Path) -> list[Line]:
    found = []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8. {FORM}.") from error
    for count, line in enumerate(text.splitlines(), start=1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        origin = f"{path}, line {count}"
        try:
            place, label = _quoted(words) if "," in words and '"' in words else _parted(words, path.parent)
        except csv.Error as error:
            raise DataError(f"{origin} cannot be read as CSV ({error}). {FORM}.") from error
        if not place or not label:
            raise DataError(f"{origin}: {words!r} has no label. {FORM}.")
        video = path.parent / place
        folder, frames = _parted(place, path.parent)
        if frames.isdecimal() and not video.exists() and (path.parent / folder).is_dir():
            video = path.parent / folder
        found.append(Line(str(video), label, origin))
    if not found:
        raise DataError(f"{path} has no lines. {FORM}.")
    first, *others = found
    if (
        not first.label.isdecimal()
        and not Path(first.video).exists()
        and all(line.label != first.label for line in others)
        and any(Path(line.video).exists() for line in others)
    ):
        raise DataError(
            f"{first.origin} looks like a header: there is no {first.video}, and no other line has the label "
            f"{first.label!r}. Remove the line, or begin it with #; if it is none, restore the video."
        )
    return found


def _quoted(words: str) -> tuple[str, str]:
    """As ``_cut``, of a line of CSV in which fields may be in quotes."""
    *before, behind = next(csv.reader([words], skipinitialspace=True))
    return ",".join(before).strip(), behind.strip()


def _parted(words: str, root: Path) -> tuple[str, str]:
    """As ``_cut``, of a line whose comma may be one of a path, where blanks part it from the label."""
    place, label = _cut(words)
    if "," in words and len(at_blanks := words.rsplit(None, 1)) == 2 and not (root / place).exists():
        there, last = at_blanks
        if (root / there).exists() or (root / there.rsplit(None, 1)[0]).is_dir():
            return there, last
    return place, label


def _cut(words: str) -> tuple[str, str]:
    """What is before and what is behind the last comma, or the last blanks where there is no comma."""
    before, *behind = words.rsplit("," if "," in words else None, 1)
    return before.strip(), "".join(behind).strip()
