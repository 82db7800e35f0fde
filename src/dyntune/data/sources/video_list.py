"""Lists of videos and labels, as the public code of video models keeps them."""

from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits
from dyntune.data.sources.base import Request, Source
from dyntune.data.sources.video_folder import SPLITS
from dyntune.data.videos import LabelledVideos

FORM = "Expected lines PATH LABEL, or FOLDER FRAMES LABEL, with blanks or commas between, and paths below the list's"


class VideoList(Source):
    """A text file with a path and a label in each line; labels are numbers, or all names.

    Paths are relative to the list's folder. A list called ``train`` has its validation and test lists beside it, under
    names such as ``val.csv`` and ``test.csv`` with the same suffix; what is missing is treated as in a folder.
    """

    prefix = "video-list:"
    form = "video-list:FILE"

    def load(self, request: Request) -> DataSplits:
        path = request.path
        if not path.is_file():
            raise DataError(f"no list {path}. {FORM}.")
        lists = {"train": path}
        if path.stem == "train":
            for split in ("val", "test"):
                beside = [path.with_stem(name) for name in SPLITS[split] if path.with_stem(name).is_file()]
                lists |= {split: beside[0]} if beside else {}
        lines = {split: _read(file) for split, file in lists.items()}
        labels = {label for split in lines.values() for _, label, _ in split}
        numbers = {label for label in labels if label.isdecimal()}
        if numbers and labels - numbers:
            first = next(origin for split in lines.values() for _, label, origin in split if label not in numbers)
            raise DataError(f"{first}: its label is a name, but those of other lines are numbers. Give one kind.")
        if numbers:
            highest = max(map(int, numbers))
            if highest >= max(100_000, 10 * len(numbers)):
                raise DataError(f"{path}: the highest label is {highest}. Expected zero-based numbers of classes.")
            classes = [str(label) for label in range(highest + 1)]
        else:
            classes = sorted(labels)
        number = {name: label for label, name in enumerate(classes)}
        sets = {
            split: LabelledVideos(
                [video for video, _, _ in own],
                [int(label) if numbers else number[label] for _, label, _ in own],
                [origin for _, _, origin in own],
            )
            for split, own in lines.items()
        }
        return request.splits(sets["train"], sets.get("val"), sets.get("test"), classes)


def _read(path: Path) -> list[tuple[str, str, str]]:
    """Path, label and origin of each line."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        place, _, label = text.rpartition("," if "," in text else " ")
        place, label = place.strip(), label.strip()
        origin = f"{path}, line {number}"
        if not place or not label:
            raise DataError(f"{origin}: {text!r} has no label. {FORM}.")
        video = path.parent / place
        folder, _, count = place.rpartition("," if "," in place else " ")
        if not video.exists() and count.strip().isdecimal() and (path.parent / folder.strip()).is_dir():
            video = path.parent / folder.strip()
        found.append((str(video), label, origin))
    if not found:
        raise DataError(f"{path} has no lines. {FORM}.")
    return found
