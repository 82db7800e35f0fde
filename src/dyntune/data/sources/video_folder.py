"""Folders of videos with one subfolder per class."""

from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.images import list_images
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_off
from dyntune.data.videos import LabelledVideos, list_videos

SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
TEST_FRACTION = 0.2
LAYOUT = (
    "Expected PATH/train/CLASS/VIDEO, with PATH/val and PATH/test beside it where there are any, or PATH/CLASS/VIDEO; "
    "a video is a file, or a folder of frames."
)


class VideoFolder(Source):
    """A folder of videos; class names sorted by code point give the labels, as for ``folder:``.

    With ``path/train``, the validation videos are those of ``path/val`` (or ``valid`` or ``validation``), the test
    videos those of ``path/test``; both must have the class folders of ``train``. With class folders only, 20% of the
    videos become the test split, always the same ones, and ``val_fraction`` of the others the validation split.
    """

    prefix = "video-folder:"
    form = "video-folder:PATH"

    def load(self, request: Request) -> DataSplits:
        path = request.path
        if not path.is_dir():
            raise DataError(f"no folder {path}. {LAYOUT} Check the spelling.")
        folders = _subfolders(path)
        found = {split: [name for name in names if name in folders] for split, names in SPLITS.items()}
        twice = next((names for names in found.values() if len(names) > 1), None)
        if twice:
            raise DataError(f"{path} has {' and '.join(twice)}: expected one of them; rename or remove the others.")
        if not found["train"]:
            held_out = [*found["val"], *found["test"]]
            if held_out:
                raise DataError(f"{path} has {' and '.join(held_out)} but no train folder. {LAYOUT}")
            data, classes = _training(path)
            train, test = split_off(data, TEST_FRACTION, key="test")
            return request.splits(train, None, test, classes)
        own, classes = _training(path / "train")
        val, held = (_evaluation(path, found[split], classes) for split in ("val", "test"))
        return request.splits(own, val, held, classes)


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read(path: Path, classes: list[str]) -> LabelledVideos:
    videos = [(video, label) for label, name in enumerate(classes) for video in list_videos(path / name)]
    return LabelledVideos([video for video, _ in videos], [label for _, label in videos])


def _training(path: Path) -> tuple[LabelledVideos, list[str]]:
    """The videos and class names of a folder that defines the classes: each of them must have a video."""
    classes = _subfolders(path)
    if not classes:
        raise DataError(f"no class folders in {path}. {LAYOUT}")
    data = _read(path, classes)
    empty = [name for label, name in enumerate(classes) if label not in set(data.targets)]
    if empty:
        images = any(list_images(path / name) for name in empty)
        advice = f"Of images, give folder:{path}." if images else "Add videos to them, or remove the folders."
        raise DataError(f"no videos in the class folders {', '.join(map(repr, empty))} of {path}. {advice}")
    return data, classes


def _evaluation(path: Path, names: list[str], classes: list[str]) -> LabelledImages | None:
    """The videos of a folder that must have the classes of the training folder; None where there is none."""
    if not names:
        return None
    folder = path / names[0]
    differing = sorted(set(classes) ^ set(_subfolders(folder)))
    if differing:
        raise DataError(
            f"the class folders of {folder} and {path / 'train'} differ: {', '.join(map(repr, differing))}. Expected "
            "the same class folders in both; rename, add (an empty one will do in the former) or remove them."
        )
    return _read(folder, classes)
