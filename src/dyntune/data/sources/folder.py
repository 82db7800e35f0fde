"""Folders of images with one subfolder per class, as torchvision and timm lay them out."""

import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.core.texts import printable
from dyntune.data.base import LabelledImages
from dyntune.data.datasets import FileImages
from dyntune.data.images import drawn, is_data_folder, is_image_name, report_left_out, scan_images
from dyntune.data.sources.base import Held, Request, Source
from dyntune.data.splits import DataSplits, split_of, split_off

TEST_FRACTION = 0.2
LAYOUT = (
    "Expected PATH/train/CLASS/IMAGE, with PATH/val and PATH/test beside it where there are any, or PATH/CLASS/IMAGE."
)
_TITLES = {"train": "training", "val": "validation", "test": "test"}
_DEEPEST = 8

log = logging.getLogger("dyntune")


@dataclass(frozen=True)
class _Entries:
    """What lies in a folder itself: names of folders that can hold data, and of images."""

    folders: tuple[str, ...]
    images: tuple[str, ...]


def _entries(path: Path) -> _Entries:
    with os.scandir(path) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries]
    folders = sorted(name for name, is_folder in found if is_folder and is_data_folder(name))
    return _Entries(tuple(folders), tuple(name for name, is_folder in found if not is_folder and is_image_name(name)))


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(name)}'" for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _entered(path: Path) -> Path:
    """The folder to look for splits in: ``path``, or one that only holds splits with nothing else on the way to it."""
    here = path
    for _ in range(_DEEPEST):
        inside = _entries(here)
        if len(inside.folders) != 1 or inside.images or split_of(inside.folders[0]):
            return path
        here /= inside.folders[0]
        below = _entries(here)
        if below.folders and not below.images and all(map(split_of, below.folders)):
            return here
    return path


def _splits_in(root: Path) -> dict[str, Path]:
    """The folders of ``root`` that are splits, by split; none where its folders are classes.

    Raises:
        DataError: two folders are the same split, or it cannot be told whether they are splits or classes.
    """
    folders = _entries(root).folders
    named = [name for name in folders if split_of(name)]
    inside = {name: _entries(root / name) for name in named}
    flat = [name for name in named if inside[name].images and not inside[name].folders]
    others = [name for name in folders if name not in named]
    if named == flat:
        if not named or ([name.lower() for name in named] == ["train"] and others):
            return {}  # a train is a class among others, of vehicles
        raise DataError(
            f"{root} has {_named(named)}, whose images lie in no class folders{', beside ' * bool(others)}"
            f"{_named(others)}. {LAYOUT} Put the images into class folders, or move images without labels elsewhere."
        )
    found: dict[str, Path] = {}
    for name in named:
        split = split_of(name)
        assert split is not None  # of the named ones
        if name in flat:
            log.warning(
                "%s: left out the %d images of %s, which lie in no class folders, and so have no labels.",
                printable(str(root)),
                len(inside[name].images),
                printable(name),
            )
        elif split in found:
            raise DataError(
                f"{root} has {printable(found[split].name)} and {printable(name)}: expected one {_TITLES[split]} "
                "folder; rename or remove the others."
            )
        else:
            found[split] = _unwrapped(root / name, split)
    if others:
        log.warning("%s: left out what lies beside the splits: %s.", printable(str(root)), _named(others))
    return found


def _unwrapped(path: Path, split: str) -> Path:
    """The folder of a split without one of the same name around it, as some archives have it."""
    inside = _entries(path)
    alone = len(inside.folders) == 1 and not inside.images and split_of(inside.folders[0]) == split
    return path / inside.folders[0] if alone and _entries(path / inside.folders[0]).folders else path


def _class_folders(path: Path) -> list[str]:
    """The names of the class folders, in the order of their labels; each holds images, or nothing at all.

    Raises:
        DataError: there are none, or one holds nothing but folders.
    """
    inside = _entries(path)
    names, pictures = [], []
    for name in inside.folders:
        own = _entries(path / name)
        if drawn(own.images):
            pictures.append(name)
            continue
        if own.folders and not own.images:
            hint = f" Give {path / name} if that is the data set." if len(inside.folders) == 1 else ""
            raise DataError(
                f"{path / printable(name)} is no class folder: it holds no images, but the folders "
                f"{_named(own.folders)}. {LAYOUT}{hint}"
            )
        names.append(name)
    if pictures:
        log.warning("%s: left out pictures that dyntune drew: %s.", printable(str(path)), _named(pictures))
    if not names:
        raise DataError(f"no class folders in {path}. {LAYOUT}")
    if inside.images:
        log.warning(
            "%s: left out %d images that lie in no class folder, such as %s.",
            printable(str(path)),
            len(inside.images),
            printable(min(inside.images)),
        )
    return names


def _read_classes(path: Path, folders: Sequence[str], labels: Sequence[int], root: Path) -> FileImages:
    """The images of class folders, with their labels; says how many other files there are."""
    images: list[Path] = []
    targets: list[int] = []
    left: Counter[str] = Counter()
    for name, label in zip(folders, labels, strict=True):
        found, others = scan_images(path / name)
        images += found
        targets += [label] * len(found)
        left += others
    report_left_out(path, left)
    return FileImages(images, targets, root=root)


def _read_training(path: Path, root: Path) -> tuple[FileImages, list[str]]:
    """The images and class folders of a folder that defines the classes: two at least, each with an image."""
    folders = _class_folders(path)
    data = _read_classes(path, folders, range(len(folders)), root)
    empty = sorted(set(range(len(folders))) - set(data.targets))
    if empty:
        names = _named([folders[label] for label in empty])
        raise DataError(f"no images in the class folders {names} of {path}. Add images to them, or remove the folders.")
    if len(folders) < 2:
        raise DataError(
            f"{path} has one class folder, {_named(folders)}, with {len(data)} images, and of one class there is "
            f"nothing to tell apart. {LAYOUT} Give the folder that holds the class folders."
        )
    return data, folders


def _read_evaluation(path: Path, train: Path, folders: Sequence[str], root: Path) -> FileImages:
    """The images of a folder that must have the classes of the training folder."""
    found = set(_class_folders(path))
    missing, extra = sorted(set(folders) - found), sorted(found - set(folders))
    if missing or extra:
        differences = [f"{path} lacks {_named(missing)}"] if missing else []
        differences += [f"{train} lacks {_named(extra)}"] if extra else []
        raise DataError(
            f"the class folders of {path} and {train} differ: {'; '.join(differences)}. Expected the same class "
            "folders in both; rename, add (an empty one will do in the former) or remove them."
        )
    return _read_classes(path, folders, range(len(folders)), root)


class Folder(Source):
    """An image folder; class names sorted by code point give the labels, as in torchvision.

    Splits are folders called ``train``, ``val`` or ``test``, or by one of the usual other names, in any capitals
    (:func:`dyntune.data.splits.split_of`). A folder that is the only one, and only holds splits, is entered.

    With a training folder, the validation and test images are those of the others, which must have the same class
    folders. Without a validation folder about ``val_fraction`` of the training images are split off as ``seed`` says;
    nothing is ever taken from the test images.

    With class folders only, about 20% of the images become the test split and ``val_fraction`` of the others the
    validation split. Which of them an image is in follows from its path below the folder, so images that are added
    later move no other; the test split does not depend on ``seed`` either, so that no run can be tested on images that
    a run with another seed was trained on.
    """

    prefix = "folder:"
    form = "folder:PATH or the PATH of an image folder"
    order = 1  # any folder may be one of images: it is one where no other source knows it

    def recognises(self, path: Path) -> bool:
        return path.is_dir()

    def load(self, request: Request) -> DataSplits:
        root, found = self._layout(request)
        if not found:
            data, folders = _read_training(root, root)
            train, test = split_off(data, TEST_FRACTION, key="test")
            return request.splits(train, None, test, list(map(printable, folders)))
        if "train" not in found:
            raise DataError(
                f"{root} has {' and '.join(printable(path.name) for path in found.values())} but no train folder. "
                f"{LAYOUT} To evaluate a run on it, no other folder is needed."
            )
        train, folders = _read_training(found["train"], root)
        others: dict[str, LabelledImages] = {
            split: _read_evaluation(path, found["train"], folders, root)
            for split, path in found.items()
            if split != "train"
        }
        return request.splits(train, others.get("val"), others.get("test"), list(map(printable, folders)))

    def held(self, request: Request, classes: Sequence[str] | None = None) -> Held:
        root, found = self._layout(request)
        places = found or {"all": root}
        folders = {split: _class_folders(path) for split, path in places.items()}
        names = list(classes or sorted({printable(name) for each in folders.values() for name in each}))
        images: dict[str, LabelledImages] = {}
        for split, path in places.items():
            unknown = [name for name in folders[split] if printable(name) not in names]
            if unknown:
                other = len(unknown) == len(folders[split])
                advice = "Give images of these classes." if other else "Give a folder without them, or rename them."
                raise DataError(
                    f"{path} has the class folders {_named(unknown)}, which are no classes that the model was trained "
                    f"on ({_named(names)}). {advice}"
                )
            labels = [names.index(printable(name)) for name in folders[split]]
            images[split] = _read_classes(path, folders[split], labels, root)
            if not len(images[split]):
                raise DataError(f"no images in the class folders of {path}. Add images to them.")
            absent = sorted(set(range(len(names))) - set(images[split].targets))
            if absent:
                none = _named([names[label] for label in absent])
                log.warning("%s: there are no images of %d classes: %s.", printable(str(path)), len(absent), none)
        if found:
            if "val" not in images and "train" in images:
                train, val = split_off(images["train"], request.val_fraction, key=f"val/{request.seed}")
                images |= {"train": train, "val": val}
            return Held(request.name, images, tuple(names), plain=False)
        everything = images.pop("all")
        try:
            rest, test = split_off(everything, TEST_FRACTION, key="test")
            train, val = split_off(rest, request.val_fraction, key=f"val/{request.seed}")
            images = {"train": train, "val": val, "test": test}
        except DataError:  # too few to be split, but not to be evaluated on
            images = {"test": everything}
        return Held(request.name, images, tuple(names), plain=True)

    def _layout(self, request: Request) -> tuple[Path, dict[str, Path]]:
        """The folder whose folders are splits or classes, and the splits."""
        path = request.path
        if not path.is_dir():
            raise DataError(f"no folder {path}. {LAYOUT} Check the spelling.")
        root = _entered(path)
        if root != path:
            log.warning("%s: took %s, which holds the splits.", printable(str(path)), printable(str(root)))
        return root, _splits_in(root)
