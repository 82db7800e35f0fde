"""Folders of images with one subfolder per class, as torchvision and timm lay them out."""

from collections.abc import Sequence
from pathlib import Path

from dyntune.core.errors import DataError
from dyntune.data.base import DataSplits, LabelledImages
from dyntune.data.datasets import FileImages
from dyntune.data.images import list_images
from dyntune.data.sources.base import Request, Source
from dyntune.data.splits import split_off

VAL_NAMES = ("val", "valid", "validation")
TEST_FRACTION = 0.2
LAYOUT = (
    "Expected PATH/train/CLASS/IMAGE, with PATH/val and PATH/test beside it where there are any, or PATH/CLASS/IMAGE."
)


def _subfolders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _read_classes(path: Path, classes: Sequence[str]) -> FileImages:
    images = [(image, label) for label, name in enumerate(classes) for image in list_images(path / name)]
    return FileImages([image for image, _ in images], [label for _, label in images])


def _read_training(path: Path) -> tuple[FileImages, list[str]]:
    """The images and class names of a folder that defines the classes: each of them must have an image."""
    classes = _subfolders(path)
    if not classes:
        raise DataError(f"no class folders in {path}. {LAYOUT}")
    data = _read_classes(path, classes)
    empty = sorted(set(range(len(classes))) - set(data.targets))
    if empty:
        names = ", ".join(repr(classes[label]) for label in empty)
        raise DataError(f"no images in the class folders {names} of {path}. Add images to them, or remove the folders.")
    return data, classes


def _read_evaluation(path: Path, train: Path, classes: Sequence[str]) -> FileImages:
    """The images of a folder that must have the classes of the training folder."""
    found = set(_subfolders(path))
    missing, extra = sorted(set(classes) - found), sorted(found - set(classes))
    if missing or extra:
        differences = [f"{path} lacks {', '.join(map(repr, missing))}"] if missing else []
        differences += [f"{train} lacks {', '.join(map(repr, extra))}"] if extra else []
        raise DataError(
            f"the class folders of {path} and {train} differ: {'; '.join(differences)}. Expected the same class "
            "folders in both; rename, add (an empty one will do in the former) or remove them."
        )
    return _read_classes(path, classes)


class Folder(Source):
    """An image folder; class names sorted by code point give the labels, as in torchvision.

    With ``path/train``, the validation images are those of ``path/val`` (or ``valid`` or ``validation``), the test
    images those of ``path/test``; both must have the class folders of ``train``. Without a validation folder
    ``val_fraction`` of the training images are split off, stratified by class, as ``seed`` says; nothing is ever taken
    from the test images.

    With class folders only, 20% of the images become the test split and ``val_fraction`` of the others the validation
    split, both stratified. That test split does not depend on ``seed``, so that no run can be tested on images
    that a run with another seed was trained on.
    """

    prefix = "folder:"
    form = "folder:PATH or the PATH of an image folder"
    order = 1  # any folder may be one of images: it is one where no other source knows it

    def recognises(self, path: Path) -> bool:
        return path.is_dir()

    def load(self, request: Request) -> DataSplits:
        path = request.path
        if not path.is_dir():
            raise DataError(f"no folder {path}. {LAYOUT} Check the spelling.")
        found = _subfolders(path)
        vals = [alias for alias in VAL_NAMES if alias in found]
        if len(vals) > 1:
            raise DataError(
                f"{path} has {' and '.join(vals)}: expected one validation folder; rename or remove the others."
            )

        val: LabelledImages | None = None
        test: LabelledImages | None = None
        if "train" in found:
            train: LabelledImages
            train, classes = _read_training(path / "train")
            if vals:
                val = _read_evaluation(path / vals[0], path / "train", classes)
            if "test" in found:
                test = _read_evaluation(path / "test", path / "train", classes)
        else:
            held_out = [*vals, *(["test"] if "test" in found else [])]
            if held_out:
                raise DataError(f"{path} has {' and '.join(held_out)} but no train folder. {LAYOUT}")
            data, classes = _read_training(path)
            train, test = split_off(data, TEST_FRACTION, key="test")
        return request.splits(train, val, test, classes)
