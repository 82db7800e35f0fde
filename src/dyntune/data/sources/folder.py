"""Folders of images with one subfolder per class, as torchvision and timm lay them out."""

import contextlib
import logging
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from dyntune.core.errors import DataError
from dyntune.core.texts import printable
from dyntune.core.words import counted, several
from dyntune.data.base import LabelledImages
from dyntune.data.datasets import FileImages
from dyntune.data.images import drawn, is_data_folder, is_image_name, report_left_out, scan_images
from dyntune.data.sources.base import Held, Request, Source
from dyntune.data.splits import DataSplits, says_nothing, split_of, split_off, splits_among
from dyntune.data.videos import is_video_name

TEST_FRACTION = 0.2
_TITLES = {"train": "training", "val": "validation", "test": "test"}
_DEEPEST = 8
_STRAY = 0.5
"""How far the share of a split that is made may be from what was asked for, of that, before it is said."""

log = logging.getLogger("dyntune")


@dataclass(frozen=True)
class Kind:
    """What lies in class folders.

    Args:
        noun: what one is called, ``image``.
        layout: what folders of them look like, for errors.
        named: whether a file is one, by its name.
        scan: those under a folder, and how many other files of each suffix lie there.
        report: says the latter.
        labelled: a data set of such, their labels and the folder that they are known by their paths below.
        other: a prefix of DATA, and whether a class folder without any holds what goes with that.
        folder: whether a folder inside a class folder is one.
    """

    noun: str
    layout: str
    named: Callable[[str], bool]
    scan: Callable[[Path], tuple[list[Path], Counter[str]]]
    report: Callable[[Path, Counter[str]], None]
    labelled: Callable[[list[Path], list[int], Path], LabelledImages]
    other: tuple[str, Callable[[Path], bool]]
    folder: Callable[[Path], bool] = lambda path: False

    def hint(self, path: Path, folders: Sequence[str]) -> str:
        """Which DATA argument the class folders of a path want, if they hold what goes with another."""
        prefix, holds = self.other
        return f" Or give {prefix}{path}." if any(holds(path / name) for name in folders) else ""


def _labelled_images(paths: list[Path], labels: list[int], root: Path) -> LabelledImages:
    return FileImages(paths, labels, root=root)


def _holds_videos(path: Path) -> bool:
    return any(is_video_name(name) for _, _, files in os.walk(path) for name in files)


IMAGES = Kind(
    "image",
    "Expected PATH/train/CLASS/IMAGE, with PATH/val and PATH/test beside it where there are any, or PATH/CLASS/IMAGE.",
    is_image_name,
    scan_images,
    report_left_out,
    _labelled_images,
    ("video-folder:", _holds_videos),
)


@dataclass(frozen=True)
class _Entries:
    """What lies in a folder itself: names of folders that can hold data, and of images, or what else is looked for."""

    folders: tuple[str, ...]
    items: tuple[str, ...]


def _entries(path: Path, kind: Kind) -> _Entries:
    with os.scandir(path) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries]
    folders = sorted(name for name, is_folder in found if is_folder and is_data_folder(name))
    return _Entries(tuple(folders), tuple(name for name, is_folder in found if not is_folder and kind.named(name)))


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(f"'{printable(name)}'" for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _entered(path: Path, kind: Kind) -> Path:
    """The folder to look for splits in: ``path``, or one that only holds splits with nothing else on the way to it."""
    here = path
    for _ in range(_DEEPEST):
        inside = _entries(here, kind)
        if len(inside.folders) != 1 or inside.items or split_of(inside.folders[0]):
            return path
        here /= inside.folders[0]
        below = _entries(here, kind)
        if below.folders and not below.items and len(splits_among(below.folders)) == len(below.folders):
            return here
    return path


def _splits_in(root: Path, kind: Kind) -> dict[str, Path]:
    """The folders of ``root`` that are splits, by split; none where its folders are classes.

    Raises:
        DataError: two folders are the same split, or it cannot be told whether they are splits or classes.
    """
    folders = _entries(root, kind).folders
    splits = splits_among(folders)
    named = list(splits)
    inside = {name: _entries(root / name, kind) for name in named}
    flat = [name for name in named if inside[name].items and not inside[name].folders]
    others = [name for name in folders if name not in named]
    if named == flat:
        if not named or ([name.lower() for name in named] == ["train"] and others):
            return {}  # a train is a class among others, of vehicles
        raise DataError(
            f"{root} has {_named(named)}, whose {kind.noun}s lie in no class folders{', beside ' * bool(others)}"
            f"{_named(others)}. {kind.layout} Put the {kind.noun}s into class folders, or move {kind.noun}s without "
            "labels elsewhere; rename what is a class, not a split."
        )
    found: dict[str, Path] = {}
    for name, split in splits.items():
        if name in flat:
            log.warning(
                "%s: left out the %s of %s, which lie in no class folders, and so have no labels.",
                printable(str(root)),
                counted(len(inside[name].items), kind.noun),
                printable(name),
            )
        elif split in found:
            raise DataError(
                f"{root} has {printable(found[split].name)} and {printable(name)}: expected one {_TITLES[split]} "
                "folder; rename or remove the others."
            )
        else:
            found[split] = _unwrapped(root / name, split, kind)
    if not any(map(split_of, named)):
        log.warning("%s: took %s for splits, by what their names have in common.", printable(str(root)), _named(named))
    if others:
        log.warning("%s: left out what lies beside the splits: %s.", printable(str(root)), _named(others))
    return found


def _unwrapped(path: Path, split: str, kind: Kind) -> Path:
    """The folder of a split without one of the same name around it, as some archives have it."""
    inside = _entries(path, kind)
    alone = len(inside.folders) == 1 and not inside.items and split_of(inside.folders[0]) == split
    return path / inside.folders[0] if alone and _entries(path / inside.folders[0], kind).folders else path


def _known(name: str) -> str:
    """The name of a class as it is compared: systems differ in how they write accents."""
    return unicodedata.normalize("NFC", printable(name))


def _class_folders(path: Path, kind: Kind) -> list[str]:
    """The names of the class folders, in the order of their labels; each holds what is looked for, or nothing at all.

    Raises:
        DataError: there are none, or one holds nothing but folders.
    """
    inside = _entries(path, kind)
    names, pictures = [], []
    for name in inside.folders:
        own = _entries(path / name, kind)
        if all(map(is_image_name, own.items)) and drawn(own.items):
            pictures.append(name)
            continue
        alone = len(own.folders) == 1 and says_nothing(own.folders[0])  # CLASS/images/IMAGE, as in Tiny ImageNet
        if (
            own.folders
            and not own.items
            and not alone
            and not any(kind.folder(path / name / other) for other in own.folders)
        ):
            hint = f" Give {path / name} if that is the data set." if len(inside.folders) == 1 else ""
            raise DataError(
                f"{path / printable(name)} is no class folder: it holds no {kind.noun}s, but the folders "
                f"{_named(own.folders)}. {kind.layout}{hint}"
            )
        names.append(name)
    if pictures:
        log.warning("%s: left out pictures that dyntune drew: %s.", printable(str(path)), _named(pictures))
    if not names:
        raise DataError(f"no class folders in {path}. {kind.layout}")
    if len(set(map(_known, names))) < len(names):
        twice = [name for name in names if sum(_known(name) == _known(other) for other in names) > 1]
        raise DataError(f"{path} has {_named(twice)}, which differ in how their accents are written alone. Join them.")
    if inside.items:
        log.warning(
            "%s: left out %s that %s in no class folder, such as %s.",
            printable(str(path)),
            counted(len(inside.items), kind.noun),
            "lies" if len(inside.items) == 1 else "lie",
            printable(min(inside.items)),
        )
    return names


def _read_classes(path: Path, folders: Sequence[str], labels: Sequence[int], root: Path, kind: Kind) -> LabelledImages:
    """What lies in class folders, with labels; says how many other files there are."""
    items: list[Path] = []
    targets: list[int] = []
    left: Counter[str] = Counter()
    for name, label in zip(folders, labels, strict=True):
        found, others = kind.scan(path / name)
        items += found
        targets += [label] * len(found)
        left += others
    kind.report(path, left)
    return kind.labelled(items, targets, root)


def _read_training(path: Path, root: Path, kind: Kind) -> tuple[LabelledImages, list[str]]:
    """The images and class folders of a folder that defines the classes: two at least, each with an image."""
    folders = _class_folders(path, kind)
    data = _read_classes(path, folders, range(len(folders)), root, kind)
    empty = sorted(set(range(len(folders))) - set(data.targets))
    if empty:
        without = [folders[label] for label in empty]
        raise DataError(
            f"no {kind.noun}s in the class folders {_named(without)} of {path}. Add {kind.noun}s to them, or remove "
            f"the folders.{kind.hint(path, without)}"
        )
    if len(folders) < 2:
        raise DataError(
            f"{path} has one class folder, {_named(folders)}, with {counted(len(data), kind.noun)}, and of one class "
            f"there is nothing to tell apart. {kind.layout} Give the folder that holds the class folders."
        )
    return data, folders


def _read_evaluation(path: Path, train: Path, folders: Sequence[str], root: Path, kind: Kind) -> LabelledImages:
    """The images of a folder that must have the classes of the training folder."""
    found = {_known(name): name for name in _class_folders(path, kind)}
    wanted = {_known(name): name for name in folders}
    missing = sorted(name for known, name in wanted.items() if known not in found)
    extra = sorted(name for known, name in found.items() if known not in wanted)
    if missing or extra:
        differences = [f"{path} lacks {_named(missing)}"] if missing else []
        differences += [f"{train} lacks {_named(extra)}"] if extra else []
        raise DataError(
            f"the class folders of {path} and {train} differ: {'; '.join(differences)}. Expected the same class "
            "folders in both; rename, add (an empty one will do in the former) or remove them."
        )
    return _read_classes(path, [found[known] for known in wanted], range(len(folders)), root, kind)


def _report_made(data: DataSplits, asked: dict[str, float]) -> None:
    """Says what came out of splits that were made, where a class has nothing in one, or its size is far from what was
    asked for: paths decide one by one, so that of a few it can.

    Args:
        data: the splits.
        asked: the share of what was split, for each split that was made.
    """
    made = {"val": data.val, "test": data.test}
    parts = {split: part for split in asked if (part := made[split]) is not None}
    total = len(data.train) + sum(map(len, parts.values()))
    absent = {
        split: [name for label, name in enumerate(data.classes) if label not in set(part.targets)]
        for split, part in parts.items()
    }
    if not any(absent.values()) and all(
        abs(len(part) / total / asked[split] - 1) <= _STRAY for split, part in parts.items()
    ):
        return
    noun = data.train.noun
    shares = [
        f"{len(part)} for {_TITLES[split]} ({len(part) / total:.0%}; {asked[split]:.0%} on average)"
        for split, part in parts.items()
    ]
    without = [f"there are no {_TITLES[split]} {noun}s of {_named(names)}" for split, names in absent.items() if names]
    log.warning(
        "%s: of %d %ss, %d are for training, %s, as the path of each says, so that those added later move no other%s. "
        "To choose them yourself, put them into folders called %s.",
        printable(data.name),
        total,
        noun,
        len(data.train),
        " and ".join(shares),
        "".join(f"; {words}" for words in without),
        ", ".join(["train", *parts]),
    )


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
    kind: ClassVar[Kind] = IMAGES

    def recognises(self, path: Path) -> bool:
        return path.is_dir()

    def load(self, request: Request) -> DataSplits:
        root, found = self._layout(request)
        if not found:
            data, folders = _read_training(root, root, self.kind)
            train, test = split_off(data, TEST_FRACTION, key="test")
            splits = request.splits(train, None, test, list(map(printable, folders)))
            _report_made(splits, {"val": (1 - TEST_FRACTION) * request.val_fraction, "test": TEST_FRACTION})
            return splits
        if "train" not in found:
            raise DataError(
                f"{root} has {' and '.join(printable(path.name) for path in found.values())} but no train folder. "
                f"{self.kind.layout} To evaluate a run on it, no other folder is needed."
            )
        train, folders = _read_training(found["train"], root, self.kind)
        others: dict[str, LabelledImages] = {
            split: _read_evaluation(path, found["train"], folders, root, self.kind)
            for split, path in found.items()
            if split != "train"
        }
        splits = request.splits(train, others.get("val"), others.get("test"), list(map(printable, folders)))
        if "val" not in found:
            _report_made(splits, {"val": request.val_fraction})
        return splits

    def held(self, request: Request, classes: Sequence[str] | None = None) -> Held:
        root, found = self._layout(request)
        places = found or {"all": root}
        folders = {split: _class_folders(path, self.kind) for split, path in places.items()}
        every = {_known(name): printable(name) for each in folders.values() for name in each}
        names = list(classes or sorted(every.values()))
        known = {_known(name): label for label, name in enumerate(names)}
        images: dict[str, LabelledImages] = {}
        for split, path in places.items():
            unknown = [name for name in folders[split] if _known(name) not in known]
            if unknown:
                other = len(unknown) == len(folders[split])
                advice = "Give images of these classes." if other else "Give a folder without them, or rename them."
                raise DataError(
                    f"{path} has the class folders {_named(unknown)}, which are no classes that the model was trained "
                    f"on ({_named(names)}). {advice}"
                )
            labels = [known[_known(name)] for name in folders[split]]
            images[split] = _read_classes(path, folders[split], labels, root, self.kind)
            if not len(images[split]):
                raise DataError(
                    f"no {self.kind.noun}s in the class folders of {path}. Add {self.kind.noun}s to them."
                    f"{self.kind.hint(path, folders[split])}"
                )
            absent = sorted(set(range(len(names))) - set(images[split].targets))
            if absent:
                none = _named([names[label] for label in absent])
                log.warning(
                    "%s: there are no %s of %s: %s.",
                    printable(str(path)),
                    several(self.kind.noun),
                    counted(len(absent), "class"),
                    none,
                )
        if found:
            if "val" not in images and "train" in images:
                with contextlib.suppress(DataError):  # too few to be split, but not to be evaluated on
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
            raise DataError(f"no folder {path}. {self.kind.layout} Check the spelling.")
        root = _entered(path, self.kind)
        if root != path:
            log.warning("%s: took %s, which holds the splits.", printable(str(path)), printable(str(root)))
        return root, _splits_in(root, self.kind)
